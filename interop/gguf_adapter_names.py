"""Which tensor of a llama.cpp adapter belongs to which torch module, by architecture."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from interop.keymaps import LLAMA, LLAMA_GGUF, Keymap, Rule, indices, tensor_name
from lora_jax.models.config import DecoderConfig

PlaceKind = Literal["linear", "embedding", "norm"]

_KINDS: dict[str, PlaceKind] = {"linear": "linear", "embedding": "embedding", "other": "norm"}
_LAYER = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,5})(?=\.)")


class Architecture(NamedTuple):
    """The names of one ``general.architecture``."""

    torch: Keymap
    gguf: Keymap
    reordered: tuple[str, ...]
    """The leaves whose output rows llama.cpp has in its own order (`interop.gguf_rotary`)."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        LLAMA, LLAMA_GGUF, ("layers/self_attn/q_proj/kernel", "layers/self_attn/k_proj/kernel")
    )
}


class Place(NamedTuple):
    """One tensor of the base and what an adapter of it must look like."""

    tensor: str
    """In GGUF files."""
    module: str
    """In torch."""
    kind: PlaceKind
    sizes: tuple[int, ...]
    """Inputs and outputs; of a norm its width; () where no model is known."""
    head_dim: int | None = 0
    """Of heads whose rows are reordered; 0 where none are, ``None`` where no model is known."""


def places(config: DecoderConfig, architecture: str) -> list[Place]:
    """Every tensor of a model that an adapter file may have, in the order of the model.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=2)
    >>> for place in places(config, "llama")[:3]: print(*place)
    token_embd.weight model.embed_tokens embedding (8, 4) 0
    blk.0.attn_norm.weight model.layers.0.input_layernorm norm (4,) 0
    blk.0.attn_q.weight model.layers.0.self_attn.q_proj linear (4, 4) 2
    """
    from lora_jax.models.decoder import leaf_shapes

    names = ARCHITECTURES[architecture]
    rules, torch_names = _weights(names.gguf), _weights(names.torch)
    known = leaf_shapes(config)
    shapes = {path: known[path] for path in rules if path in known}
    found = []
    for path, shape in shapes.items():
        rule = rules[path]
        rotated = path in names.reordered and not config.rope_interleaved
        kind, head_dim = _KINDS[rule.kind], config.head_dim if rotated else 0
        for index in indices(rule, shape):
            module = tensor_name(torch_names[path], index).removesuffix(".weight")
            tensor = tensor_name(rule, index)
            found.append(Place(tensor, module, kind, shape[rule.stack :], head_dim))
    return found


def modules_of_tables(config: DecoderConfig, architecture: str) -> tuple[str, ...]:
    """The torch modules that share one table, where a model's head is tied to its embedding."""
    copies = ARCHITECTURES[architecture].torch.copies if config.tie_embeddings else {}
    return tuple(name.removesuffix(".weight") for pair in copies.items() for name in pair)


def places_of_names(tensors: Iterable[str], architecture: str) -> list[Place]:
    """The places of those tensors that the architecture knows, for a model that isn't known.

    >>> places_of_names(["blk.7.ffn_up.weight", "blk.x.ffn_up.weight"], "llama")[0].module
    'model.layers.7.mlp.up_proj'
    """
    names = ARCHITECTURES[architecture]
    rules = {rule.name: rule for rule in _weights(names.gguf).values()}
    torch_names = _weights(names.torch)
    found = []
    for tensor in tensors:
        layer = _LAYER.search(tensor)
        index = (int(layer[0]),) if layer else ()
        template = f"{tensor[: layer.start()]}{{i}}{tensor[layer.end() :]}" if layer else tensor
        if rule := rules.get(template):
            module = tensor_name(torch_names[rule.path], index).removesuffix(".weight")
            head_dim = None if rule.path in names.reordered else 0
            found.append(Place(tensor, module, _KINDS[rule.kind], (), head_dim))
    return found


def expected_shapes(place: Place, *found: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of A and B in the file, or of a norm, given those that it has.

    The rank is that of B, and where no model is known so are the sizes.

    >>> expected_shapes(Place("output.weight", "lm_head", "linear", (4, 8)), (3, 5), (6, 2))
    [(2, 4), (8, 2)]
    >>> expected_shapes(Place("token_embd.weight", "", "embedding", ()), (8, 2), (4, 2))
    [(8, 2), (4, 2)]
    """
    first, last = found[0], found[-1]
    if place.kind == "norm":
        return [place.sizes or last[:1]]
    is_table = place.kind == "embedding"
    inputs, outputs = place.sizes or (first[0 if is_table else -1], last[0])
    rank = last[-1]
    return [(inputs, rank) if is_table else (rank, inputs), (outputs, rank)]


def _weights(table: Keymap) -> dict[str, Rule]:
    return {rule.path: rule for rule in table.rules if rule.name.endswith(".weight")}
