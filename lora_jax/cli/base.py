"""The base model of a command, the chat format it speaks, and its adapted forms."""

import functools
import hashlib
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

import lora_jax as lora
from lora_jax.data.chat import ChatFormat
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.generate import LanguageModel, language_model
from lora_jax.paths import named_leaves
from lora_jax.site import Plan
from lora_jax.train.precision import precision


class Base(NamedTuple):
    """A loaded model.

    Attributes:
      name: as it was asked for.
      source: where it came from.
      config: of the decoder.
      params: JAX arrays on the default device, or NumPy arrays.
      digest: fingerprint of the parameters as they are stored, before any cast.
      chat: tokenizer and template.
      special_tokens: text of ``bos``, ``eos``, ``pad`` and ``unk``, as far as there are any.
      eos_ids: tokens that end an answer.
      directory: the Hugging Face directory that it was read from, if it was one.
    """

    name: str
    source: str
    config: DecoderConfig
    params: Any
    digest: str
    chat: ChatFormat
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    directory: Path | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer alone."""
        return self.chat.tokenizer


def load_base(
    model: str, precision_name: str | None, console: Console, *, on_host: bool = False
) -> Base:
    """Load a model by alias, directory, file or hub id.

    Args:
      model: which.
      precision_name: a key of `lora_jax.train.precision.PRECISIONS`; None for the model's own.
      console: where a download shows its progress.
      on_host: leave the parameters on the host, for a caller that places them.

    Raises:
      InputError: it isn't there, isn't implemented, or has no chat template.
    """
    from interop import pretrained

    found = pretrained.load(model, progress=console)
    if not found.chat_template:
        raise InputError(f"{model} has no chat template: choose an instruction-tuned model")
    policy = precision(precision_name) if precision_name else None
    config = replace(found.config, dtype=policy.compute) if policy else found.config
    as_array = np.asarray if on_host else jnp.asarray
    in_template = {f"{role}_token": text for role, text in found.special_tokens.items()}
    return Base(
        name=found.name,
        source=found.source,
        config=config,
        params=jax.tree.map(
            lambda leaf: as_array(leaf, jnp.dtype(policy.base if policy else leaf.dtype)),
            found.params,
        ),
        digest=digest(found.params),
        chat=ChatFormat(found.tokenizer, found.chat_template, in_template),
        special_tokens=found.special_tokens,
        eos_ids=found.eos_ids,
        directory=found.directory,
    )


def digest(params: Any) -> str:
    """A fingerprint of a parameter tree: paths, shapes, dtypes and checksums of all leaves.

    It tells bases apart; it is no protection against somebody who forges one.
    """
    lines = (
        f"{path} {leaf.shape} {leaf.dtype} {zlib.crc32(_bytes(leaf)):08x}"
        for path, leaf in sorted(named_leaves(params).items())
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _bytes(leaf: Any) -> memoryview:
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data


def write_adapter(directory: Path, base: Base, adapter: Any, plan: Plan) -> None:
    """The adapter as a PEFT directory that remembers its base, in place of an earlier one."""
    from interop import peft
    from interop.families import keymap_of

    about = {"model": base.name, "source": base.source, "digest": base.digest}
    peft.write(
        directory,
        adapter,
        plan,
        keymap=keymap_of(base.config),
        params=base.params,
        base_model_name=base.name,
        base=about,
        overwrite=True,
    )


def require_writable(plan: Plan, base: Base) -> None:
    """Raise one InputError naming every site that a PEFT directory can't hold."""
    from interop import peft
    from interop.families import keymap_of

    peft.require_writable(plan, keymap=keymap_of(base.config), params=base.params)


def read_adapter(directory: Path, base: Base) -> tuple[Any, Plan]:
    """The adapter of a PEFT directory, for this base.

    Raises:
      InputError: it is damaged, doesn't fit the base, or was trained on another one.
    """
    from interop import peft
    from interop.families import keymap_of

    require_same_base(directory, base)
    return peft.read(directory, base.params, keymap=keymap_of(base.config))


def require_same_base(directory: Path, base: Base) -> None:
    """Raise an InputError if an adapter's manifest names another base than this one."""
    from interop import peft

    trained_on = peft.base_of(directory).get("digest")
    if trained_on not in (None, base.digest):
        raise InputError(
            f"{directory} was trained on another base than {base.name} ({base.source}): "
            "name its own with --model"
        )


@functools.cache
def adapted_language_model(config: DecoderConfig, plan: Plan) -> LanguageModel:
    """The decoder for generation with ``(params, adapter)`` in place of its parameters.

    Equal arguments give the same value, so that one compilation serves every adapter of a plan.
    """
    model = language_model(config)
    adapted = lora.adapt(model.apply, plan)

    def apply(params_and_adapter: Any, *args: Any) -> Any:
        params, adapter = params_and_adapter
        return adapted(params, adapter, *args)

    return model._replace(apply=apply)
