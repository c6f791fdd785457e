"""For tests of your own: a torch module and a JAX function are one function, or the test fails.

>>> import jax, jax.numpy as jnp, numpy as np, torch
>>> import lora_jax as lora
>>> from interop.conversion import from_torch
>>> from interop.keymaps import Keymap, Rule
>>> from interop.testing import assert_equivalent
>>> from interop.torch_lora import apply_lora, by_name
>>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
>>> keymap = Keymap((
...     Rule("up/kernel", "0.weight", (1, 0), "linear"), Rule("up/bias", "0.bias"),
...     Rule("down/kernel", "2.weight", (1, 0), "linear"), Rule("down/bias", "2.bias"),
... ))
>>> shapes = {"up/kernel": (4, 8), "up/bias": (8,), "down/kernel": (8, 2), "down/bias": (2,)}
>>> weights = {name: tensor.numpy() for name, tensor in mlp.state_dict().items()}
>>> params = from_torch(weights, keymap, shapes)
>>> def mlp_in_jax(params, x):
...     up = x @ params["up"]["kernel"] + params["up"]["bias"]
...     down = jnp.tanh(up) @ params["down"]["kernel"] + params["down"]["bias"]
...     return down, {"0": up, "2": down}          # what the torch modules of these names put out
>>> inputs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
>>> _ = assert_equivalent(mlp, mlp_in_jax, params, inputs)

With an adapter, which the torch module has to have too (here it is copied into it):

>>> config = lora.LoraConfig(rank=2, alpha=4, targets=".*kernel")
>>> plan = lora.plan(mlp_in_jax, params, inputs, config=config)
>>> adapter = lora.init(jax.random.key(0), params, plan)
>>> adapter = {path: pair._replace(b=pair.b + 0.1) for path, pair in adapter.items()}
>>> _ = apply_lora(mlp, by_name("0", "2"), rank=2, alpha=4)
>>> load_adapter(mlp, adapter, plan, params, keymap)
>>> found = assert_equivalent(
...     mlp, mlp_in_jax, params, inputs, adapter=adapter, plan=plan, keymap=keymap
... )
>>> len(found.gradients), found.effect > 0.1
(4, True)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interop import trained_tensors
from interop.comparison_tables import as_text, module_tables
from interop.keymaps import Keymap
from interop.module_comparison import JaxFn, ModuleComparison, TorchCall, compare
from lora_jax.adapter import Adapter
from lora_jax.site import Plan

if TYPE_CHECKING:
    from torch import nn

MIN_EFFECT = 1e-3


def assert_equivalent(
    module: "nn.Module",
    jax_fn: JaxFn,
    params: Any,
    inputs: np.ndarray | Sequence[np.ndarray],
    *,
    adapter: Adapter | None = None,
    plan: Plan | None = None,
    keymap: Keymap | None = None,
    rtol: float = 1e-5,
    gradient_rtol: float = 1e-4,
    min_effect: float = MIN_EFFECT,
    call: TorchCall = lambda module, *inputs: module(*inputs),
) -> ModuleComparison:
    """Fail with a table of all layers unless both sides compute the same.

    Arrays are compared by ‖JAX - torch‖ / ‖torch‖.

    Args:
      module: any torch module; it runs in eval mode and is left as it was.
      jax_fn: ``jax_fn(params, *inputs)``: the output, or the output and a dict of arrays by the
        name of the torch module that puts them out; under ``"layers.{i}"`` stacked ones.
      params: of ``jax_fn``.
      inputs: one NumPy array, or several.
      adapter, plan, keymap: an adapter of ``params``, its plan, and which torch module holds
        which leaf. Then the gradients of A and B are compared too, and the torch module has the
        same adapter: it is a PEFT model (loaded with ``is_trainable=True``), or adapted by
        `interop.torch_lora.apply_lora`. `load_adapter` copies it there.
      rtol: for layers and the output.
      gradient_rtol: for the gradients.
      min_effect: the least by which the adapter has to move the output, as a share of its norm: a
        fresh adapter changes nothing, and any two models that ignore it agree.
      call: how to call the module, where it doesn't return a tensor, such as
        ``lambda model, tokens: model(input_ids=tokens).logits``.

    Returns:
      What was measured.

    Raises:
      AssertionError: they differ; the message is a table in which the first that differs is marked.
      InputError: they can't be compared: other names, other shapes.
    """
    arrays = (inputs,) if isinstance(inputs, np.ndarray) else tuple(inputs)
    found = compare(
        module, jax_fn, params, arrays, adapter=adapter, plan=plan, keymap=keymap, call=call
    )
    if reasons := [*_reasons(found, rtol, gradient_rtol, min_effect)]:
        tables = as_text(module_tables(found, rtol, gradient_rtol))
        raise AssertionError(f"JAX and torch differ: {'; '.join(reasons)}\n\n{tables}")
    return found


def load_adapter(
    module: "nn.Module", adapter: Adapter, plan: Plan, params: Any, keymap: Keymap
) -> None:
    """Copy an adapter into a torch module that is adapted at the same layers, in the same ranks.

    Raises:
      InputError: naming every tensor that doesn't fit.
    """
    tensors = trained_tensors.our_tensors(adapter, plan, params, keymap)
    trained_tensors.load(module, tensors)


def _reasons(found: ModuleComparison, rtol: float, gradient_rtol: float, least: float) -> list[str]:
    compared = [(each, rtol) for each in (*found.layers, found.output)]
    compared += [(each, gradient_rtol) for each in found.gradients]
    apart = [each for each, limit in compared if not each.within(limit)]
    reasons = [f"{apart[0].name} is the first of {len(apart)} that do"] if apart else []
    if found.effect is not None and not found.effect >= least:
        reasons.append(
            f"the adapter moves the output by {found.effect:.1e} of its norm, less than "
            f"{least:g}: fill B before comparing, or agreement says little"
        )
    return reasons
