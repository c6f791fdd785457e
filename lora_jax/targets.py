"""Which leaves a target means: a regular expression, the name of a preset, or a function.

A preset picks among the weights that the model function contracts with an activation; it never
picks an embedding table or an output head, which have to be asked for by name.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Target = str | Callable[[str, Any], bool]
"""A regular expression that matches the whole path; a key of `PRESETS`; or ``f(path, leaf)``."""


class Leaf(NamedTuple):
    """A leaf of the parameter tree, as far as targets look at it."""

    path: str
    array: Any
    """Whatever has its shape and dtype."""
    matrix: tuple[int, int] | None = None
    """Input and output features where the function contracts it, and only that; else None."""


HEADS = re.compile(
    r"(?i)lm_?head|heads?(_?\d+)?|output_head|unembed(ding)?|embed_out|output|score|shared"
    r"|logits(_dense)?|classifier|(output|vocab|score)_proj(ection)?|output_projection|decoder"
    r"|embed|embed_tokens|embeddings?|tok_embeddings|token_embedding|word_embeddings|wte"
)
"""Modules outside any block whose weight is an output head or an embedding table."""

HEAD_BLOCK = re.compile(r"(?i)lm_?head|classifier|classification_?head|score")
"""Parts of a path within which everything belongs to an output head."""

ATTENTION_BLOCK = re.compile(
    r"(?i)(.*[_.])?(attn|attention|att|mha|multi_?head\w*|self_?attention|cross_?attention)"
    r"([_.\d].*)?|multihead.*|selfattention.*|crossattention.*"
)
"""Parts of a path within which everything belongs to attention."""

ATTENTION_LAYER = re.compile(
    r"(?i)[qkvo]|[qkvo]_proj|[qkv]_einsum|qkv(_proj|_einsum)?|w[qkvo]|wqkv|query|key|value"
    r"|query_key_value|c_attn|attn_vec_einsum"
)
"""Modules that belong to attention wherever they stand."""

MLP_BLOCK = re.compile(
    r"(?i)(.*[_.])?(mlp|ffn|ffw|ff|feed_?forward|moe|experts?)([_.\d].*)?|mlp.*|feedforward.*"
    r"|densereludense|intermediate"
)
"""Parts of a path within which everything belongs to the feed-forward block."""

MLP_LAYER = re.compile(
    r"(?i)gate_proj|up_proj|down_proj|gate_up_proj|fc_?(1|2|in|out)|c_fc|w[123]|w[io](_[01])?"
    r"|lin[12]|dense_h_to_4h|dense_4h_to_h|gating_einsum"
)
"""Modules that belong to the feed-forward block wherever they stand."""

PARAMETER = re.compile(r"(?i)kernel|weights?|w|embedding|bias|value|scale|base")
"""Names of a parameter within its module."""


class _Kind(NamedTuple):
    name: str
    block: re.Pattern[str]
    layer: re.Pattern[str]


_KINDS = (
    _Kind("attention", ATTENTION_BLOCK, ATTENTION_LAYER),
    _Kind("mlp", MLP_BLOCK, MLP_LAYER),
)


def kind_of(path: str) -> str | None:
    """``attention``, ``mlp`` or neither: the block nearest to the leaf decides, else its module.

    >>> kind_of("h/0/mlp/wo/kernel"), kind_of("layers/0/wo/kernel"), kind_of("head/kernel")
    ('mlp', 'attention', None)
    """
    *blocks, module = _modules_of(path)
    for part in reversed([*blocks, module]):
        for kind in _KINDS:
            if kind.block.fullmatch(part):
                return kind.name
    found = (kind.name for kind in _KINDS if kind.layer.fullmatch(module))
    return next(found, None)


def _all_linear(leaf: Leaf) -> bool:
    *blocks, module = _modules_of(leaf.path)
    in_head = HEADS.fullmatch(module) or any(map(HEAD_BLOCK.fullmatch, blocks))
    return kind_of(leaf.path) is not None or not in_head


def _attention(leaf: Leaf) -> bool:
    return kind_of(leaf.path) == "attention"


def _mlp(leaf: Leaf) -> bool:
    return kind_of(leaf.path) == "mlp"


def _square(leaf: Leaf) -> bool:
    return leaf.matrix is not None and leaf.matrix[0] == leaf.matrix[1] and _all_linear(leaf)


PRESETS: dict[str, Callable[[Leaf], bool]] = {
    "all-linear": _all_linear,
    "attention": _attention,
    "mlp": _mlp,
    "square": _square,
}
"""``all-linear``: every weight that is contracted, minus heads and embeddings (as in PEFT);
``attention``, ``mlp``: those of them whose path says so; ``square``: as many input as output
features, the rule of MiniMind's LoRA."""


def matches(target: Target, leaf: Leaf) -> bool:
    """Whether ``target`` picks ``leaf``.

    >>> matches(".*_proj/kernel", Leaf("layers/q_proj/kernel", None))
    True
    >>> matches("attention", Leaf("layers/self_attn/out/kernel", None, (8, 8)))
    True
    """
    if not isinstance(target, str):
        return bool(target(leaf.path, leaf.array))
    if target in PRESETS:
        return leaf.matrix is not None and PRESETS[target](leaf)
    return re.fullmatch(target, leaf.path) is not None


def described(target: Target) -> str:
    """The target as an error message names it."""
    return repr(target) if isinstance(target, str) else f"{getattr(target, '__name__', target)}()"


def module_of(path: str) -> str:
    """The name of the module that a parameter belongs to.

    >>> module_of("layers/0/lm_head/kernel"), module_of("embed")
    ('lm_head', 'embed')
    """
    return _modules_of(path)[-1]


def _modules_of(path: str) -> list[str]:
    parts = path.split("/")
    return [part for part in parts if not PARAMETER.fullmatch(part)] or parts
