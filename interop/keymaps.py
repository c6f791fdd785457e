"""How leaf paths and tensor names correspond, as tables; both directions come from one table.

A stacked leaf holds every layer along its first axis, a checkpoint holds one tensor per layer,
and torch keeps linear weights as (out, in)::

    layers/self_attn/q_proj/kernel (L, in, out)  <->  model.layers.{i}.self_attn.q_proj.weight
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lora_jax.errors import InputError

Shape = tuple[int, ...]
Index = tuple[int, ...]


Kind = Literal[
    "linear", "linear_in_out", "embedding", "conv", "parameter", "parameter_in_out", "other"
]


class Rule(NamedTuple):
    """One leaf and its tensors.

    A leaf that stacks layers (and, below them, experts) belongs to one tensor a layer: ``name``
    then has ``{i}`` for the index along the first axis and ``{e}`` for the one along the second.
    Where ``path`` has ``{i}`` too each layer is a leaf of its own, and the rule stands for all.

    >>> Rule("layers/fc/kernel", "h.{i}.fc.weight", (1, 0), "linear").stack
    1
    """

    path: str
    name: str
    order: tuple[int | tuple[int, ...], ...] = ()
    """Which axis of the leaf, below its stack, each axis of the tensor is; () where they agree.
    A tensor's axis that is several of the leaf's, as of heads, has a tuple: ``((1, 2), 0)``."""
    kind: Kind = "other"
    """The torch module: ``linear`` (out, in); ``linear_in_out``, as the ``Conv1D`` of transformers
    keeps it; ``embedding``; ``conv`` (out, in, window); ``parameter`` for a weight without a
    module of its own, as of stacked experts (expert, out, in), or ``parameter_in_out``; ``other``
    has no adapter in torch."""
    part: tuple[int, int] = (0, 1)
    """The tensor is the first of the pair, counted from 0, of so many equal parts of the leaf's
    last axis, as gate and up are of a fused weight."""

    @property
    def stack(self) -> int:
        """How many leading axes of the leaf the name's indices run along."""
        return len(_placeholders(self.name)) - len(_placeholders(self.path))

    def axes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The axes of the leaf, of which there are ``rank`` below its stack, by the tensor's.

        >>> Rule("q/kernel", "q.weight", ((1, 2), 0)).axes(3)
        ((1, 2), (0,))
        """
        order = self.order or tuple(range(rank))
        return tuple(axis if isinstance(axis, tuple) else (axis,) for axis in order)


class Keymap(NamedTuple):
    """Every rule of a model family in one naming scheme.

    ``ignored`` are patterns of names that hold no parameters. ``copies`` maps a name that may
    be present without being expected to the name of the tensor it must then equal.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = {}

    def over(self, paths: Iterable[str]) -> "Keymap":
        """The table of a tree with these leaves: rules for one leaf a layer are written out.

        >>> table = Keymap((Rule("h_{i}/w", "h.{i}.w"), Rule("head/w", "head.w")))
        >>> [rule.name for rule in table.over(["h_0/w", "h_1/w", "head/w"]).rules]
        ['h.0.w', 'h.1.w', 'head.w']
        """
        paths = list(paths)
        rules = (each for rule in self.rules for each in _written_out(rule, paths))
        return self._replace(rules=tuple(rules))


# By kind of module: our leaf, torch's parameter, the order of its axes, its kind for adapters.
_LEAVES: dict[str, tuple[tuple[str, str, tuple[int, ...], Kind], ...]] = {
    "embedding": (("embedding", "weight", (), "embedding"),),
    "table": (("embedding", "weight", (), "other"),),
    "norm": (("scale", "weight", (), "other"),),
    "layer_norm": (("scale", "weight", (), "other"), ("bias", "bias", (), "other")),
    "linear": (("kernel", "weight", (1, 0), "linear"), ("bias", "bias", (), "other")),
    # torch's linear layer of GPT-2, which keeps its weight as we do
    "conv1d": (("kernel", "weight", (), "linear_in_out"), ("bias", "bias", (), "other")),
}

_LLAMA_MODULES = (
    # our module, torch module, GGUF module, kind
    ("embed_tokens", "model.embed_tokens", "token_embd", "embedding"),
    ("layers/input_layernorm", "model.layers.{i}.input_layernorm", "blk.{i}.attn_norm", "norm"),
    ("layers/self_attn/q_proj", "model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q", "linear"),
    ("layers/self_attn/k_proj", "model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k", "linear"),
    ("layers/self_attn/v_proj", "model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v", "linear"),
    (
        "layers/self_attn/o_proj",
        "model.layers.{i}.self_attn.o_proj",
        "blk.{i}.attn_output",
        "linear",
    ),
    (
        "layers/post_attention_layernorm",
        "model.layers.{i}.post_attention_layernorm",
        "blk.{i}.ffn_norm",
        "norm",
    ),
    ("layers/mlp/gate_proj", "model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate", "linear"),
    ("layers/mlp/up_proj", "model.layers.{i}.mlp.up_proj", "blk.{i}.ffn_up", "linear"),
    ("layers/mlp/down_proj", "model.layers.{i}.mlp.down_proj", "blk.{i}.ffn_down", "linear"),
    ("norm", "model.norm", "output_norm", "norm"),
    ("lm_head", "lm_head", "output", "linear"),
)


def rules_of(modules: Iterable[tuple[str, str, str]]) -> tuple[Rule, ...]:
    """The rules of modules: ours, torch's, and its kind.

    >>> [rule.name for rule in rules_of([("norm", "ln_f", "layer_norm")])]
    ['ln_f.weight', 'ln_f.bias']
    """
    return tuple(
        Rule(f"{ours}/{leaf}", f"{theirs}.{suffix}", order, kind)
        for ours, theirs, module in modules
        for leaf, suffix, order, kind in _LEAVES[module]
    )


LLAMA = Keymap(
    rules_of((ours, torch, kind) for ours, torch, _, kind in _LLAMA_MODULES),
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
)
LLAMA_GGUF = Keymap(rules_of((ours, gguf, kind) for ours, _, gguf, kind in _LLAMA_MODULES))


def by_path(table: Keymap) -> dict[str, list[Rule]]:
    """The rules of each leaf, in the table's order: one, or one for each of its parts."""
    grouped = defaultdict(list)
    for rule in table.rules:
        grouped[rule.path].append(rule)
    return dict(grouped)


def module_name(path: str, table: Keymap, index: Index = ()) -> str:
    """The torch module that holds a leaf, at one layer (and expert) if the leaf stacks them.

    >>> module_name("layers/self_attn/q_proj/kernel", LLAMA, (3,))
    'model.layers.3.self_attn.q_proj'
    >>> module_name("lm_head/kernel", LLAMA)
    'lm_head'
    """
    rule = next((rule for rule in table.rules if rule.path == path), None)
    if rule is None:
        raise InputError(f"no module holds {path!r}: known leaves {[r.path for r in table.rules]}")
    if rule.stack != len(index):
        raise InputError(f"{path} has {rule.stack} stack axes: the index {index} doesn't fit them")
    return tensor_name(rule, index).rpartition(".")[0]


def blocks_of(table: Keymap) -> str:
    """The torch module that lists the blocks.

    >>> blocks_of(LLAMA)
    'model.layers'
    """
    return next(rule.name.partition(".{i}")[0] for rule in table.rules if "{i}" in rule.name)


def tensor_name(rule: Rule, index: Index = ()) -> str:
    """The rule's tensor at one index of the leaf's stack.

    >>> tensor_name(Rule("experts/w", "h.{i}.experts.{e}.w"), (3, 1))
    'h.3.experts.1.w'
    """
    return rule.name.format(**dict(zip(_placeholders(rule.name), index, strict=True)))


def tensor_shape(rule: Rule, shape: Shape) -> Shape:
    """The shape of the rule's tensor, from the leaf's.

    >>> tensor_shape(Rule("w", "h.{i}.w", (1, 0), part=(0, 2)), (3, 4, 6))
    (3, 4)
    """
    inner = shape[rule.stack :]
    inner = (*inner[:-1], inner[-1] // rule.part[1]) if inner else inner
    return tuple(math.prod(inner[axis] for axis in axes) for axes in rule.axes(len(inner)))


def tensor_view(rule: Rule, leaf: np.ndarray, index: Index = ()) -> np.ndarray:
    """The rule's tensor at one index of the leaf's stack, as a view of the leaf.

    Axes of the leaf that the tensor has as one stay apart: `tensor_shape` is what it has.
    """
    (number, count), inner = rule.part, leaf[(*index, ...)]
    if count > 1:
        width = inner.shape[-1] // count
        inner = inner[..., number * width : (number + 1) * width]
    return inner.transpose(sum(rule.axes(inner.ndim), ()))


def indices(rule: Rule, shape: Shape) -> list[Index]:
    """Every index of the stack of a leaf of that shape, in order; ``[()]`` where there is none.

    >>> indices(Rule("w", "h.{i}.w"), (2, 4, 6))
    [(0,), (1,)]
    """
    return [*np.ndindex(*shape[: rule.stack])]


def leaf_path(module: str, table: Keymap) -> tuple[str, Index]:
    """The leaf that holds a torch module's weight and its index: the inverse of `module_name`.

    >>> leaf_path("model.layers.3.self_attn.q_proj", LLAMA)
    ('layers/self_attn/q_proj/kernel', (3,))
    >>> leaf_path("model.embed_tokens", LLAMA)
    ('embed_tokens/embedding', ())
    """
    for rule in table.rules:
        if match := re.fullmatch(_pattern(rule.name), f"{module}.weight"):
            return rule.path, tuple(map(int, match.groups()))
    known = [rule.name.removesuffix(".weight") for rule in table.rules]
    raise InputError(f"no leaf for module {module!r}: known modules {known}")


def _placeholders(template: str) -> list[str]:
    return re.findall(r"{(\w)}", template)


def _pattern(template: str) -> str:
    return re.sub(r"\\{(\w)\\}", r"(?P<\1>0|[1-9]\\d*)", re.escape(template))


def _written_out(rule: Rule, paths: Iterable[str]) -> list[Rule]:
    if not _placeholders(rule.path):
        return [rule]
    matches = filter(None, (re.fullmatch(_pattern(rule.path), path) for path in paths))
    return [rule._replace(path=m.string, name=_filled(rule.name, m.groupdict())) for m in matches]


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with some of its indices set."""
    return re.sub(r"{(\w)}", lambda m: values.get(m[1], m[0]), template)
