"""Which tensor of a llama.cpp adapter belongs to which torch module, by family of the base.

====================  ============  ==========================================
family of the config  architecture  rows of q and k
====================  ============  ==========================================
llama, mistral        ``llama``     neighbours (`interop.halves`)
minimind_first        ``llama``     as they are: the model rotates neighbours
smollm3               ``smollm3``   neighbours
qwen2                 ``qwen2``     as they are
qwen3, minimind       ``qwen3``     as they are
gemma, ...            ``gemma``     as they are
phi3                  ``phi3``      as they are, fused
====================  ============  ==========================================
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from interop.families import FAMILIES
from interop.keymaps import LLAMA_GGUF, Keymap, Rule, indices, rules_of, tensor_name
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig

PlaceKind = Literal["linear", "embedding", "experts", "norm"]


class Architecture(NamedTuple):
    """What llama.cpp calls a family and makes of its tensors."""

    name: str
    """``general.architecture``"""
    reorders: bool = False
    """Output rows of q and k are in the order of rotated neighbours."""
    has_norms: bool = True
    """Norms are stored as torch has them; Gemma's are not."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", reorders=True),
    "mistral": Architecture("llama", reorders=True),
    "minimind_first": Architecture("llama", reorders=True),
    "smollm3": Architecture("smollm3", reorders=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "minimind": Architecture("qwen3"),
    "gemma": Architecture("gemma", has_norms=False),
    "gemma2": Architecture("gemma2", has_norms=False),
    "gemma3_text": Architecture("gemma3", has_norms=False),
    "phi3": Architecture("phi3"),
}

_GGUF = Keymap(
    (
        *LLAMA_GGUF.rules,
        *rules_of(
            (
                ("layers/self_attn/qkv_proj", "blk.{i}.attn_qkv", "linear"),
                ("layers/self_attn/q_norm", "blk.{i}.attn_q_norm", "norm"),
                ("layers/self_attn/k_norm", "blk.{i}.attn_k_norm", "norm"),
                ("layers/mlp/gate_up_proj", "blk.{i}.ffn_up", "linear"),
            )
        ),
    )
)
_REORDERED = ("layers/self_attn/q_proj/kernel", "layers/self_attn/k_proj/kernel")
_KINDS: dict[str, PlaceKind] = {"linear": "linear", "embedding": "embedding", "other": "norm"}


class Place(NamedTuple):
    """One tensor of the base and what an adapter of it must look like."""

    tensor: str
    """In GGUF files."""
    module: str
    """In torch."""
    kind: PlaceKind
    sizes: tuple[int, ...] = ()
    """Inputs and outputs; of a norm its width; () where no model is known."""
    head_dim: int = 0
    """Of heads whose rows are reordered; 0 where none are."""


def architecture_of(config: DecoderConfig) -> Architecture:
    """The architecture that llama.cpp has for a base.

    Raises:
      InputError: none that is known here.
    """
    if found := ARCHITECTURES.get(config.family):
        return found
    raise InputError(
        f"GGUF adapters of the family {config.family!r} are not implemented: there are those of "
        f"{', '.join(ARCHITECTURES)}"
    )


def places(config: DecoderConfig) -> list[Place]:
    """Every tensor of a model that an adapter file may have, in the order of the model.

    >>> from lora_jax.models.presets import TINY
    >>> for place in places(TINY)[:2]: print(*place)
    token_embd.weight model.embed_tokens embedding (320, 64) 0
    blk.0.attn_norm.weight model.layers.0.input_layernorm norm (64,) 0
    """
    from lora_jax.models.decoder import leaf_shapes

    architecture = architecture_of(config)
    gguf, torch = _weights(_GGUF), _weights(FAMILIES[config.family].keymap)
    found = []
    for path, shape in leaf_shapes(config).items():
        rule = gguf.get(path)
        if rule is None or (_KINDS[rule.kind] == "norm" and not architecture.has_norms):
            continue
        turned = architecture.reorders and path in _REORDERED and not config.rope_interleaved
        sizes, head_dim = shape[rule.stack :], config.head_dim if turned else 0
        for index in indices(rule, shape):
            module = tensor_name(torch[path], index).removesuffix(".weight")
            tensor = tensor_name(rule, index)
            found.append(Place(tensor, module, _KINDS[rule.kind], sizes, head_dim))
    return found


def own_place(tensor: str, axes: int) -> Place:
    """The place of a tensor in a model that isn't known, under the file's own name.

    Args:
      tensor: of the base, in the file.
      axes: how many it has there, or its B.

    >>> print(*own_place("blk.3.ffn_up_exps.weight", 3)[:3])
    blk.3.ffn_up_exps.weight blk.3.ffn_up_exps experts
    """
    kinds: dict[bool, PlaceKind] = {
        True: "linear",
        axes == 3: "experts",
        tensor == "token_embd.weight": "embedding",
        tensor.endswith("_norm.weight"): "norm",
    }
    return Place(tensor, tensor.removesuffix(".weight"), kinds[True])


def modules_of_tables(config: DecoderConfig) -> tuple[str, ...]:
    """The torch modules that share one table, where a model's head is tied to its embedding."""
    copies = FAMILIES[config.family].keymap.copies if config.tie_embeddings else {}
    return tuple(name.removesuffix(".weight") for pair in copies.items() for name in pair)


def expected_shapes(place: Place, rank: int) -> list[tuple[int, ...]]:
    """Shapes of A and B in the file, or of a norm.

    >>> expected_shapes(Place("output.weight", "lm_head", "linear", (4, 8)), 2)
    [(2, 4), (8, 2)]
    >>> expected_shapes(Place("token_embd.weight", "", "embedding", (8, 4)), 2)
    [(8, 2), (4, 2)]
    """
    if place.kind == "norm":
        return [place.sizes]
    inputs, outputs = place.sizes
    a = (inputs, rank) if place.kind == "embedding" else (rank, inputs)
    return [a, (outputs, rank)]


def _weights(table: Keymap) -> dict[str, Rule]:
    return {rule.path: rule for rule in table.rules if rule.name.endswith(".weight")}
