"""A torch module and a JAX function on the same input: layers, output, gradients of A and B.

The JAX function is ``jax_fn(params, *inputs)``. It returns its output, or the output and a dict of
what torch modules put out, by their names::

    return logits, {"embed": hidden, "layers.{i}": stacked}     # {i}: along the first axis

With an adapter it is adapted here, and the torch module comes with its own: a PEFT model, one
after `interop.torch_lora.apply_lora`, or any other that `interop.trained_tensors` knows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from interop import trained_tensors
from interop.differences import Difference, difference, differences
from interop.keymaps import Keymap
from lora_jax.adapter import Adapter
from lora_jax.errors import InputError
from lora_jax.paths import nearest
from lora_jax.site import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = dict[str, np.ndarray]
JaxFn = Callable[..., Any]
TorchCall = Callable[..., "Tensor"]
"""``call(module, *inputs)``: the module's output as one tensor."""


@dataclass(frozen=True)
class ModuleComparison:
    """What `compare` measured.

    Attributes:
      layers: the modules that the JAX function names, in the order in which torch calls them.
      output: the whole output.
      gradients: of ⟨output, a random direction⟩ with respect to every trained tensor, by its name
        in a PEFT file; empty without an adapter.
      effect: ‖adapted - base‖ / ‖base‖ of the output in JAX; None without an adapter.
    """

    layers: tuple[Difference, ...]
    output: Difference
    gradients: tuple[Difference, ...] = ()
    effect: float | None = None


class Side(NamedTuple):
    """What one framework computes."""

    output: np.ndarray
    layers: Arrays
    gradients: Arrays


def compare(
    module: "nn.Module",
    jax_fn: JaxFn,
    params: Any,
    inputs: tuple[np.ndarray, ...],
    *,
    adapter: Adapter | None = None,
    plan: Plan | None = None,
    keymap: Keymap | None = None,
    call: TorchCall = lambda module, *inputs: module(*inputs),
) -> ModuleComparison:
    """Run both sides on the same input and measure how far they are apart.

    The torch module runs in eval mode, so without dropout, and is left as it was: the mode of each
    submodule and the gradients of its parameters.

    Args:
      module: any torch module.
      jax_fn: ``jax_fn(params, *inputs)``, as the module docstring says.
      params: its parameters.
      inputs: NumPy arrays, given to both; integers become int64 in torch.
      adapter, plan, keymap: an adapter of ``params``, its plan, and which torch module holds which
        leaf; all three or none.
      call: how the module is called, where its output isn't a tensor.

    Raises:
      InputError: modules that torch doesn't have, tensors that one side lacks, other shapes.

    >>> import torch
    >>> linear = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> params = {name: jnp.array(p.detach().numpy()) for name, p in linear.named_parameters()}
    >>> def jax_fn(params, x):
    ...     y = x @ params["0.weight"].T + params["0.bias"]
    ...     return y, {"0": y}
    >>> found = compare(linear, jax_fn, params, (np.ones((4, 3), np.float32),))
    >>> found.output.shape, found.layers[0].name, found.output.within(1e-6)
    ((4, 2), '0', True)
    """
    given = adapter is not None, plan is not None, keymap is not None
    if len(set(given)) > 1:
        raise InputError("give adapter, plan and keymap together: they say what A and B belong to")
    if adapter is None or plan is None or keymap is None:
        output, layers = our_side(jax_fn, (params,), inputs)
        theirs = torch_side(module, inputs, tuple(layers), call=call)
        return _measured(Side(output, layers, {}), theirs)
    named = partial(trained_tensors.our_tensors, plan=plan, params=params, keymap=keymap)
    trained_tensors.require_fit(named(adapter), trained_tensors.trained_tensors(module))
    output, layers = our_side(lora.adapt(jax_fn, plan), (params, adapter), inputs)
    base, _ = our_side(jax_fn, (params,), inputs)
    direction = random_direction(output.shape)
    ours = named(our_gradients(jax_fn, plan, (params, adapter), inputs, direction))
    theirs = torch_side(module, inputs, tuple(layers), direction, call=call)
    return _measured(Side(output, layers, ours), theirs, _effect(output, base))


def our_side(
    jax_fn: JaxFn, parameters: tuple[Any, ...], inputs: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, Arrays]:
    """The output, and the layers by the name of their torch module, in full precision."""
    with jax.default_matmul_precision("highest"):
        output, layers = _split(jax.jit(jax_fn)(*parameters, *inputs))
    return np.asarray(output), unstacked({n: np.asarray(layer) for n, layer in layers.items()})


def our_gradients(
    jax_fn: JaxFn,
    plan: Plan,
    both: tuple[Any, Adapter],
    inputs: tuple[np.ndarray, ...],
    direction: np.ndarray,
) -> Adapter:
    """The gradient of ⟨output, direction⟩ with respect to the adapter."""
    adapted = lora.adapt(jax_fn, plan)
    params, adapter = both

    def along(adapter: Adapter, params: Any) -> jax.Array:
        output, _ = _split(adapted(params, adapter, *inputs))
        return jnp.vdot(output.astype(jnp.float32), direction)

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(along))(adapter, params)


def torch_side(
    module: "nn.Module",
    inputs: tuple[np.ndarray, ...],
    names: tuple[str, ...],
    direction: np.ndarray | None = None,
    *,
    call: TorchCall,
) -> Side:
    """Output, the outputs of the modules of these names, and the gradients along ``direction``."""
    import torch

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    tensors = [torch.tensor(_as_torch(array), device=device) for array in inputs]
    with _left_as_it_was(module), _hooked(module, names) as seen:
        with torch.set_grad_enabled(direction is not None):
            output = call(module.eval(), *tensors)
        if uncalled := [name for name in names if name not in seen]:
            raise InputError(f"torch never calls {', '.join(uncalled)}")
        along = {} if direction is None else _torch_gradients(module, output, direction)
    return Side(_numpy(output), {name: _numpy(layer) for name, layer in seen.items()}, along)


def unstacked(layers: Mapping[str, np.ndarray]) -> Arrays:
    """One array a layer for names with ``{i}``, which stack them along the first axis.

    >>> sorted(unstacked({"h.{i}": np.zeros((2, 3)), "norm": np.zeros(3)}))
    ['h.0', 'h.1', 'norm']
    """
    return {
        name.replace("{i}", str(index)): layer
        for name, array in layers.items()
        for index, layer in (enumerate(array) if "{i}" in name else [(0, array)])
    }


def random_direction(shape: tuple[int, ...]) -> np.ndarray:
    """The same for the same shape, of norm 1 or so, without a zero: no output goes unseen."""
    size = max(int(np.prod(shape)), 1)
    normal = np.random.default_rng(0).normal(size=shape)
    return np.asarray(normal / np.sqrt(size), np.float32)


def _split(result: Any) -> tuple[Any, Mapping[str, Any]]:
    return result if isinstance(result, tuple) else (result, {})


def _as_torch(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array


@contextmanager
def _left_as_it_was(module: "nn.Module") -> Iterator[None]:
    """Each submodule in its own mode, each parameter with its own gradient, whatever happens."""
    modes = [(each, each.training) for each in module.modules()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _hooked(module: "nn.Module", names: tuple[str, ...]) -> "Iterator[dict[str, Tensor]]":
    """A dict that fills up with what the modules put out, in the order in which they are called."""
    modules = dict(module.named_modules())
    prefix = trained_tensors.PREFIX if hasattr(module, "peft_config") else ""
    if absent := [name for name in names if prefix + name not in modules]:
        near = {name: nearest(prefix + name, modules) for name in absent}
        raise InputError(f"the torch module has no {', '.join(absent)} (nearest: {near})")
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if name in seen:
            raise InputError(f"torch calls {name} more than once: name a module that runs once")
        seen[name] = output[0] if isinstance(output, tuple) else output

    def hook(name: str) -> Any:
        keep_it = partial(keep, name)
        return modules[prefix + name].register_forward_hook(lambda _, __, out: keep_it(out))

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(hook(name).remove)
        yield seen


def _torch_gradients(module: "nn.Module", output: "Tensor", direction: np.ndarray) -> Arrays:
    import torch

    module.zero_grad(set_to_none=True)
    if output.shape != direction.shape:
        raise InputError(f"the output is {direction.shape} in JAX and {tuple(output.shape)} here")
    (output.float() * torch.from_numpy(direction).to(output.device)).sum().backward()
    return trained_tensors.gradients(module)


def _numpy(tensor: "Tensor") -> np.ndarray:
    return tensor.detach().float().cpu().numpy().copy()


def _measured(ours: Side, theirs: Side, effect: float | None = None) -> ModuleComparison:
    return ModuleComparison(
        layers=differences(ours.layers, theirs.layers),
        output=difference("output", ours.output, theirs.output),
        gradients=differences(ours.gradients, theirs.gradients),
        effect=effect,
    )


def _effect(adapted: np.ndarray, base: np.ndarray) -> float:
    return difference("output", adapted, base).relative
