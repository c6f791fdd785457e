"""PEFT adapter directories <-> (adapter, plan), both ways without loss.

==============================  ==========================================================
entry                           in PEFT
==============================  ==========================================================
``LoraPair`` on a layer         ``target_modules``, and patterns where layers differ
``LoraPair`` on an embedding    the same; with ``ensure_weight_tying`` where the head is tied
``LoraPair`` on experts         ``target_parameters``
``DoraTriple``                  the same with ``use_dora``
``Full``                        ``modules_to_save``; of biases alone ``bias``
``Rows``                        ``trainable_token_indices``
``Bias``                        ``lora_bias``
==============================  ==========================================================

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them,
and ``manifest.json`` with the digest of both, which PEFT does not look at and `read` checks.

Source: the format and the matching of https://github.com/huggingface/peft, release 0.21.2.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop import torch_io
from interop.keymaps import Keymap
from interop.peft_config import read_config
from interop.peft_config_writing import config_of
from interop.peft_folders import CONFIG, PICKLED_WEIGHTS, WEIGHTS, located
from interop.peft_matching import PeftConfig
from interop.peft_modules import Base
from interop.peft_notes import About, notes_of
from interop.peft_plans import plan_problems, serving_problems
from interop.peft_reading import raise_all, sites_and_entries
from interop.peft_serving import folded
from interop.peft_sites import claims_of
from interop.peft_writing import tensors_of, value_problems
from lora_jax.adapter import Adapter, check
from lora_jax.errors import InputError
from lora_jax.files import write_text
from lora_jax.manifest import MANIFEST, checked_base, new_or_replaced, to_json, write_manifest
from lora_jax.paths import named_leaves
from lora_jax.site import Plan

_FILES = (CONFIG, WEIGHTS)


def write(
    directory: str | os.PathLike,
    adapter: Adapter,
    plan: Plan,
    *,
    keymap: Keymap,
    params: Any = None,
    base_model_name: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    base: Mapping[str, Any] | None = None,
    for_serving: bool = False,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write an adapter as a directory that PEFT loads; it appears whole or not at all.

    Values are float32. Equal input gives equal bytes.

    Args:
      directory: absent or empty; its parents are made.
      adapter: the entries by path.
      plan: the plan that the adapter was made from.
      keymap: which torch module holds which leaf.
      params: the base's parameter tree, arrays or shapes. Needed where an embedding is adapted
        or a leaf is trained whole, which PEFT stores according to what else the model has.
      base_model_name: hub id or directory of the base, for PEFT's auto classes.
      revision: of ``base_model_name``.
      task_type: PEFT's, for its auto classes; by default ``CAUSAL_LM`` where the keymap has a
        module ``lm_head``, else none, which any torch module can be loaded with.
      base: JSON values about the base, such as name and digest, for the manifest; `base_of`
        gives them back.
      for_serving: write one rank and one scale for all, which vLLM and SGLang need: A and B are
        filled up with zeros, and scales that differ are multiplied into B. The adapter must then
        consist of plain pairs of linear layers.
      overwrite: replace a directory in which there is nothing but an adapter from here.

    Returns:
      What was folded for serving, a sentence for each site that changed.

    Raises:
      InputError: naming every site that PEFT has no form for, every one whose values are not
        finite or not zero beyond its layers' ranks; or the directory can't be written or holds
        something.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> import lora_jax as lora
    >>> from interop.keymaps import LLAMA
    >>> params = {"lm_head": {"kernel": jnp.ones((4, 6))}}
    >>> config = lora.LoraConfig(rank=2, alpha=3, targets="lm_head/kernel")
    >>> plan = lora.plan_from_axes(params, config, {".*": "in out"})
    >>> adapter = lora.init(jax.random.key(0), params, plan)
    >>> directory = Path(tempfile.mkdtemp()) / "adapter"
    >>> write(directory, adapter, plan, keymap=LLAMA)
    ()
    >>> sorted(file.name for file in directory.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors', 'manifest.json']
    >>> read(directory, params, keymap=LLAMA)[1]["lm_head/kernel"].scale
    1.5
    """
    check(adapter, plan)
    if Path(directory).is_symlink():
        raise InputError(f"{directory} is a symbolic link: name the directory itself")
    model = _base(keymap, params, plan)
    problems = [*plan_problems(plan, model), *value_problems(adapter, plan, model)]
    if for_serving and not problems:
        problems = [*serving_problems(plan, model)]
    raise_all("this adapter can't be written for PEFT", problems)
    adapter, plan, notes = folded(adapter, plan) if for_serving else (adapter, plan, ())
    task_type = task_type or ("CAUSAL_LM" if _has_head(keymap) else None)
    config = config_of(plan, model, base_model_name, revision, task_type, not for_serving)
    replaceable = (*_FILES, MANIFEST) if overwrite else ()
    with new_or_replaced(Path(directory).absolute(), replaceable) as folder:
        write_text(folder / CONFIG, to_json(config))
        torch_io.write(folder / WEIGHTS, tensors_of(adapter, plan, model))
        write_manifest(folder, _FILES, base or {})
    return notes


def require_writable(plan: Plan, *, keymap: Keymap, params: Any = None) -> None:
    """Raise one InputError that names everything in the plan which PEFT has no form for.

    It needs no adapter: ask before training rather than after. Arguments are those of `write`.
    """
    problems = plan_problems(plan, _base(keymap, params, plan))
    raise_all("this plan can't be written for PEFT", problems)


def read(
    directory: str | os.PathLike,
    params: Any,
    *,
    keymap: Keymap,
    adapter_name: str | None = None,
) -> tuple[Adapter, Plan]:
    """Read a PEFT directory for the model whose parameter tree is ``params``.

    Modules, layers, ranks and scales are matched as PEFT matches them. float16, bfloat16 and
    float64 tensors become float32, as in PEFT. Where PEFT stored the weights of an adapted
    embedding or head beside the adapter they must equal the base's. PiSSA and OLoRA become the
    equal LoRA of twice the rank against ``params``. What PEFT itself computes otherwise than its
    formulas say is right here; `notes` names it.

    Args:
      directory: holds adapter_config.json and adapter_model.safetensors (or .bin). Where there
        is a manifest.json its digests must hold.
      params: the base parameter tree, arrays or shapes (arrays for PiSSA and OLoRA).
      keymap: which torch module holds which leaf.
      adapter_name: of several adapters in one directory, each in a folder of its name.

    Returns:
      The adapter, float32, and its plan, for `lora_jax.adapt` and `lora_jax.merge`.

    Raises:
      InputError: a file that is absent or differs from the manifest; every config key that
        changes the function in a way that is not represented here; or every module and every
        tensor (missing, unexpected, mis-shaped, not floating, not finite) that doesn't fit.
    """
    folder, config, tensors = _opened(directory, adapter_name)
    leaves = named_leaves(params)
    sites, adapter = sites_and_entries(config, tensors, Base(keymap, leaves), folder)
    return adapter, Plan(sites, sum(math.prod(leaf.shape) for leaf in leaves.values()))


def notes(
    directory: str | os.PathLike,
    params: Any,
    *,
    keymap: Keymap,
    adapter_name: str | None = None,
) -> tuple[str, ...]:
    """What to know of an adapter that `read` can read: where PEFT computes something else.

    Arguments are those of `read`.

    Returns:
      A sentence for each place where this PEFT is wrong or an older one wrote another layout,
      for targets that match nothing, and for what was converted in reading.
    """
    _, config, tensors = _opened(directory, adapter_name)
    base = Base(keymap, named_leaves(params))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return notes_of(About(config, claims_of(config, base)[0], shapes, base))


def base_of(directory: str | os.PathLike, adapter_name: str | None = None) -> dict[str, Any]:
    """What `write` was told about the base, from a manifest whose digests hold.

    Returns:
      The dict given as ``base``; empty where there is no manifest, as in PEFT's own directories.

    Raises:
      InputError: the directory or one of its files isn't there, or a file differs from the
        manifest.
    """
    folder = located(Path(directory), adapter_name)
    return checked_base(folder, _FILES) if (folder / MANIFEST).exists() else {}


def _opened(
    directory: str | os.PathLike, adapter_name: str | None
) -> tuple[Path, PeftConfig, torch_io.Tensors]:
    folder = located(Path(directory), adapter_name)
    base_of(folder)
    return folder, read_config(folder / CONFIG), _read_tensors(folder)


def _base(keymap: Keymap, params: Any, plan: Plan) -> Base:
    """Where the parameters aren't given, as much of the base as the plan tells."""
    leaves = {site.path: site for site in plan.sites} if params is None else named_leaves(params)
    return Base(keymap, leaves, known=params is not None)


def _has_head(keymap: Keymap) -> bool:
    return "lm_head.weight" in {*keymap.copies, *(rule.name for rule in keymap.rules)}


def _read_tensors(directory: Path) -> torch_io.Tensors:
    """The file that PEFT would take: safetensors before the pickle."""
    pickled = directory / PICKLED_WEIGHTS
    use_pickle = pickled.is_file() and not (directory / WEIGHTS).is_file()
    return torch_io.read(pickled if use_pickle else directory / WEIGHTS)
