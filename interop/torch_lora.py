"""LoRA in torch, to read and to check against: the layer, its injection and its merge.

Written from the papers and tutorials, apart from the JAX code that it is compared with::

    names = apply_lora(model, by_name("q_proj", "v_proj"), rank=8, alpha=16)  # freezes the rest
    print(trainable_summary(model))
    train(model, updates, recipe)          # torch_training.py
    save_adapter(model, "adapter.pth")     # torch_lora_files.py: A and B alone
    unload(merge(model))                   # for inference: the plain model, with W + ΔW
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_jax.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


class LowRankPath:
    """What `LoRALinear` adds to a torch Module: y = W x + bias + scaling · B (A dropout(x)).

    W (out, in) and the bias are frozen. A (rank, in) starts random and B (out, rank) at zero, so
    that a fresh layer computes what it did before, and A's first gradient is zero.

    loralib merges whenever a module goes to eval mode, and a state dict saved there holds ΔW twice
    when it is loaded to train; here `merge` and `unmerge` are calls of their own.

    Args:
      layer: the ``nn.Linear`` to adapt, or GPT-2's ``Conv1D``, whose weight is (in, out), what
        loralib calls fan_in_fan_out; it is kept and frozen.
      rank: rows of A and columns of B.
      alpha: scaling is alpha/rank; None for a scaling of 1, as MiniMind has it.
      dropout: share of the entries of A's input that are dropped in training.
      init_std: A is normal with this deviation (0.02 in MiniMind); None for uniform within
        ±1/√in, the default of ``nn.Linear``, loralib and PEFT.

    Source: Hu et al., "LoRA", arXiv:2106.09685.
    """

    original_layer: "nn.Linear"
    lora_A: "nn.Parameter"
    lora_B: "nn.Parameter"
    dropout: "nn.Dropout"

    def __init__(
        self,
        layer: "nn.Linear",
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        init_std: float | None = None,
    ):
        import torch
        from torch import nn

        super().__init__()
        # At least float32: an update of bfloat16 factors would be lost in rounding.
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        a, b = layer.weight.new_empty, layer.weight.new_zeros
        self.fan_in_fan_out = not isinstance(layer, nn.Linear)
        shape = tuple(layer.weight.shape)
        outputs, inputs = shape[::-1] if self.fan_in_fan_out else shape
        self.original_layer = layer.requires_grad_(False)
        self.lora_A = nn.Parameter(a((rank, inputs), dtype=dtype))
        self.lora_B = nn.Parameter(b((outputs, rank), dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        self.scaling = 1.0 if alpha is None else alpha / rank
        self._unmerged_weight: Tensor | None = None
        self._initialise(init_std)

    def _initialise(self, std: float | None) -> None:
        from torch.nn import init

        if std is None:
            init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # = uniform within ±1/√in
        else:
            init.normal_(self.lora_A, std=std)

    def forward(self, x: "Tensor") -> "Tensor":
        """The layer's output (..., out) in the base's dtype, rounded once after the sum."""
        y = self.original_layer(x)
        if self.merged:
            return y
        hidden = self.dropout(x.to(self.lora_A.dtype)) @ self.lora_A.T
        return (y + hidden @ self.lora_B.T * self.scaling).to(y.dtype)

    def delta_weight(self) -> "Tensor":
        """ΔW = scaling · B A, of W's shape: (out, in), or (in, out) with fan_in_fan_out."""
        delta = (self.lora_B @ self.lora_A * self.scaling).detach()
        return delta.T if self.fan_in_fan_out else delta

    @property
    def merged(self) -> bool:
        """Whether the base weight holds ΔW now."""
        return self._unmerged_weight is not None

    def merge(self) -> None:
        """Put W + ΔW, summed in A's dtype and rounded once, in W's place; again does nothing."""
        if not self.merged:
            weight = self.original_layer.weight
            self._unmerged_weight = weight.data
            weight.data = (weight.data + self.delta_weight()).to(weight.dtype)

    def unmerge(self) -> None:
        """Put W back: the very tensor, since W + ΔW - ΔW would not give W again."""
        if self._unmerged_weight is not None:
            weight = self.original_layer.weight
            weight.data = self._unmerged_weight.to(weight)  # where the model is now
            self._unmerged_weight = None


if TYPE_CHECKING:

    class LoRALinear(LowRankPath, nn.Module):
        """A `LowRankPath` that is a torch Module."""


@cache
def _lora_linear() -> "type[LoRALinear]":
    from torch import nn

    about = {"__module__": __name__, "__doc__": LowRankPath.__doc__}
    return type("LoRALinear", (LowRankPath, nn.Module), about)  # pyright: ignore


def __getattr__(name: str) -> Any:
    """`LoRALinear`, made when it is first asked for: the class needs torch, this module doesn't."""
    if name != "LoRALinear":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _lora_linear()


Linears = Mapping[str, "nn.Linear"]
"""The linear layers of a model by their names."""
Selection = Callable[[Linears], list[str]]
"""Picks the names of the layers to adapt: `by_name`, `by_regex`, `square` or your own."""


def by_name(*names: str) -> Selection:
    """Layers whose dotted name is, or ends with, one of ``names``, as a list means in PEFT.

    Raises:
      InputError: when it is used, naming every name that no layer has.

    >>> by_name("q_proj")({"layers.0.q_proj": None, "layers.0.seq_proj": None})
    ['layers.0.q_proj']
    """

    def select(linears: Linears) -> list[str]:
        found = {name: [n for n in linears if f".{n}".endswith(f".{name}")] for name in names}
        if absent := [name for name, layers in found.items() if not layers]:
            raise InputError(f"no linear layer is named {', '.join(absent)}: {_known(linears)}")
        return [n for n in linears if any(n in layers for layers in found.values())]

    return select


def by_regex(pattern: str) -> Selection:
    """Layers whose whole dotted name the regular expression matches.

    >>> by_regex(r".*\\.[qv]_proj")({"layers.0.q_proj": None, "layers.0.k_proj": None})
    ['layers.0.q_proj']
    """
    return lambda linears: [name for name in linears if re.fullmatch(pattern, name)]


def square(linears: Linears) -> list[str]:
    """Layers with as many inputs as outputs: MiniMind's rule."""
    shapes = {name: layer.weight.shape for name, layer in linears.items()}
    return [name for name, (rows, columns) in shapes.items() if rows == columns]


def apply_lora(
    model: "nn.Module",
    select: Selection,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    init_std: float | None = None,
) -> list[str]:
    """Put a `LoRALinear` in the place of each selected layer, in place, and freeze all else.

    Called again, with another rank perhaps, it adapts further layers beside the first ones.

    Args:
      model: holds ``nn.Linear`` or ``Conv1D`` layers. Subclasses are left alone, since their
        owners may read the weight past ``forward``, as ``nn.MultiheadAttention`` does.
      select: which of them.
      rank, alpha, dropout, init_std: as for `LowRankPath`.

    Returns:
      The names of the adapted layers.

    Raises:
      InputError: nothing is selected, or what isn't there; a layer's weight is shared, so that a
        merge would change another layer too; ``rank`` is below 1.
    """
    linears = dict(_linears(model))
    names = select(linears)
    _require_sound(model, linears, names, rank)
    make = _lora_linear()
    model.requires_grad_(False)
    for name in names:
        lora = make(linears[name], rank, alpha, dropout=dropout, init_std=init_std)
        model.set_submodule(name, lora)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad = layer.lora_B.requires_grad = True
    return names


def lora_layers(model: "nn.Module") -> dict[str, LowRankPath]:
    """The adapted layers by name."""
    modules: Any = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LowRankPath)}


def merge(model: "nn.Module") -> "nn.Module":
    """Merge every adapted layer, for inference without a second path; gives the model back."""
    for layer in lora_layers(model).values():
        layer.merge()
    return model


def unmerge(model: "nn.Module") -> None:
    """Take every merged layer back to its own weight, exactly."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def unload(model: "nn.Module") -> "nn.Module":
    """Put the plain layers back, merged if they are: names and classes of the base again."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.original_layer)
    return model


def factors(model: "nn.Module") -> "dict[str, Tensor]":
    """A copy of every A and B by name, such as `movements` starts from."""
    return {
        f"{name}.{factor}": getattr(layer, factor).detach().clone()
        for name, layer in lora_layers(model).items()
        for factor in ("lora_A", "lora_B")
    }


def movements(model: "nn.Module", since: "Mapping[str, Tensor]") -> dict[str, float]:
    """‖now - then‖ of every A and B, to watch which layers learn."""
    return {name: (now - since[name]).norm().item() for name, now in factors(model).items()}


def parameter_counts(model: "nn.Module") -> tuple[int, int]:
    """Trainable parameters and all parameters, each shared one counted once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def trainable_summary(model: "nn.Module") -> str:
    """The line that PEFT's ``print_trainable_parameters`` prints."""
    trainable, total = parameter_counts(model)
    share = f"trainable%: {100 * trainable / total:.4f}"
    return f"trainable params: {trainable:,d} || all params: {total:,d} || {share}"


def _linears(model: "nn.Module") -> "Iterator[tuple[str, nn.Linear]]":
    """Linear layers that are not adapted yet."""
    from torch import nn

    # A model that holds a Conv1D has imported its class.
    transformers = sys.modules.get("transformers.pytorch_utils")
    kinds = (nn.Linear, getattr(transformers, "Conv1D", nn.Linear))
    adapted = tuple(f"{name}." for name in lora_layers(model))
    modules: Any = model.named_modules()
    for name, module in modules:
        if name and type(module) in kinds and not name.startswith(adapted):
            yield name, module


def _require_sound(model: "nn.Module", linears: Linears, names: list[str], rank: int) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared = [owners[id(linears[name].weight)] for name in names if name in linears]
    problems = [f"{' and '.join(both)} are one weight" for both in shared if len(both) > 1]
    problems += [f"{name} is no linear layer" for name in names if name not in linears]
    problems += [] if names else [f"no linear layer is selected: {_known(linears)}"]
    problems += [] if rank >= 1 else [f"rank must be at least 1, got {rank}"]
    if problems:
        raise InputError("; ".join(problems))


def _known(linears: Linears) -> str:
    return f"there are {', '.join(linears)}" if linears else "there is none that is not adapted"
