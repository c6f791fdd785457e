"""What an adapted torch module trains, under the names that PEFT's files have.

=============================  ==========================================================
module                         its A and B
=============================  ==========================================================
a PEFT model                   ``base_model.model.{module}.lora_A.default.weight``, ...
torch_lora.py, loralib         ``{module}.lora_A``, ``{module}.lora_B``
MiniMind                       ``{module}.lora.A.weight``, ``{module}.lora.B.weight``
a LoRALayer, input axis first  ``{module}.lora.lora_A``, ``{module}.lora.lora_B``
=============================  ==========================================================

Whatever else requires a gradient is a parameter trained whole, and keeps its name.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interop.keymaps import Keymap
from interop.lora_pth import LAYOUTS
from interop.peft_layout import PREFIX, Base, is_pair
from interop.peft_writing import tensors_of
from lora_jax.adapter import Adapter, check
from lora_jax.errors import InputError
from lora_jax.paths import named_leaves, nearest
from lora_jax.site import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = dict[str, np.ndarray]


def trained_tensors(
    module: "nn.Module", part: "Callable[[nn.Parameter], Tensor]" = lambda parameter: parameter
) -> "dict[str, Tensor]":
    """Every trained parameter, or ``part`` of it, by its name in a PEFT file, turned as there.

    Raises:
      InputError: nothing requires a gradient.
    """
    trained = {name: part(p) for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError(
            "no parameter of the torch module requires a gradient: adapt it, or load the adapter "
            "with is_trainable=True"
        )
    if not hasattr(module, "peft_config"):
        return dict(_plainly_named(name, tensor) for name, tensor in trained.items())
    from peft import get_peft_model_state_dict

    model: Any = module
    return get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)


def values(module: "nn.Module") -> Arrays:
    """A copy of every trained parameter, float32."""
    return _copied(trained_tensors(module))


def gradients(module: "nn.Module") -> Arrays:
    """The gradient of every trained parameter, float32; zeros where torch has none."""
    return _copied(trained_tensors(module, _gradient))


def our_tensors(adapter: Adapter, plan: Plan, params: Any, keymap: Keymap) -> Arrays:
    """The arrays of an adapter, or of its gradient, as torch's tensors: by layer, cut, turned.

    Raises:
      InputError: naming every adapted leaf that the keymap has no torch module for.
    """
    check(adapter, plan)
    base = Base(keymap, named_leaves(params))
    if problems := [*_unnamed(plan, base)]:
        raise InputError(f"the keymap doesn't cover the plan: {'; '.join(problems)}")
    return tensors_of(adapter, plan, base)


def load(module: "nn.Module", tensors: Mapping[str, np.ndarray]) -> None:
    """Copy `our_tensors` into the trained parameters of a torch module.

    Raises:
      InputError: naming every tensor that one side lacks or that has another shape.

    >>> import torch
    >>> from interop.torch_lora import apply_lora, by_name
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> _ = apply_lora(model, by_name("0"), rank=1)
    >>> prefix = "base_model.model.0.lora"
    >>> load(model, {f"{prefix}_A.weight": np.ones((1, 3)), f"{prefix}_B.weight": np.ones((2, 1))})
    >>> model[0].lora_A.tolist()
    [[1.0, 1.0, 1.0]]
    """
    import torch

    targets = {name: tensor.detach() for name, tensor in trained_tensors(module).items()}
    require_fit(tensors, targets)
    for name, target in targets.items():
        target.copy_(torch.from_numpy(np.array(tensors[name])))


def require_fit(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise one InputError naming every tensor that one side lacks or that has another shape."""
    wrong = [
        f"{name} is {_shape(ours, name)} in JAX and {_shape(theirs, name)} in torch"
        for name in sorted(theirs.keys() | ours.keys())
        if _shape(ours, name) != _shape(theirs, name)
    ]
    if wrong:
        raise InputError(f"the adapter doesn't fit the torch module: {'; '.join(wrong)}")


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "absent"


def _gradient(parameter: "nn.Parameter") -> "Tensor":
    return parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad


def _copied(tensors: "Mapping[str, Tensor]") -> Arrays:
    return {n: tensor.detach().float().cpu().numpy().copy() for n, tensor in tensors.items()}


def _plainly_named(name: str, tensor: "Tensor") -> "tuple[str, Tensor]":
    for form in sorted(LAYOUTS.values(), key=lambda form: -len(form.a)):
        for suffix, factor in ((form.a, "lora_A"), (form.b, "lora_B")):
            if name.endswith(suffix):
                owner = name.removesuffix(suffix)
                return f"{PREFIX}{owner}.{factor}.weight", tensor.T if form.in_first else tensor
    return f"{PREFIX}{name}", tensor


def _unnamed(plan: Plan, base: Base) -> Iterator[str]:
    for site in plan.sites:
        rule = base.rules.get(site.path)
        if rule is None:
            yield f"no rule for {site.path!r} (nearest: {nearest(site.path, base.rules) or 'none'})"
        elif is_pair(site) and base.kind(site.path) is None:
            yield f"the rule of {site.path!r} has kind {rule.kind!r}: say which module it is"
