"""Families of causal decoders in Hugging Face's form, one row of a table each.

A row says which attributes of ``config.json`` set which field of `DecoderConfig`, which must have
the value that the decoder implements, which change nothing, what all members have in common, and
how tensors are named. Whatever a row doesn't mention is refused (`interop.hf_config`).

====================  ==========================================================================
``llama``             Llama 1 to 3, SmolLM 1 and 2
``mistral``           one window for all layers
``qwen2``, ``qwen3``  biased q, k and v; normed heads
``smollm3``           layers without rotation
``gemma`` to          scaled embeddings, norms of scale 1 + w; norms after, caps, windows in
``gemma3_text``       alternation; normed heads, two rotations
``gpt2``, ``opt``     learned positions, LayerNorm, plain MLP; GPT-2 fuses q, k and v
``phi3``              fused q, k and v, fused gate and up
``mixtral``,          a mixture of experts in the MLP's place, in Mistral and in Qwen3
``qwen3_moe``
``minimind``          MiniMind since 2026: Qwen3's arithmetic
``minimind_first``    MiniMind before April 2025: Llama with rotated neighbours, names of its own
``minimind_moe``,     the same two with a mixture of experts; the older has one that all meet
``minimind_first_moe``
====================  ==========================================================================
"""

from collections.abc import Collection

from interop import family_experts, family_gemma, family_gpt, family_llama, family_minimind
from interop.family import Family, Found
from interop.keymaps import Keymap, tensor_name
from lora_jax.models.config import DecoderConfig

FAMILIES: dict[str, Family] = {
    **family_llama.ROWS,
    **family_experts.ROWS,
    **family_gemma.ROWS,
    **family_gpt.ROWS,
    **family_minimind.ROWS,
}
"""By name: ``model_type``, except that all of MiniMind share theirs."""


def family_of(config: DecoderConfig) -> Family:
    """The row of a config's family."""
    return FAMILIES[config.family]


def keymap_of(config: DecoderConfig) -> Keymap:
    """How the tensors of a config's model are named, as modules in memory.

    >>> from interop.keymaps import LLAMA
    >>> from lora_jax.models.presets import TINY
    >>> keymap_of(TINY) is LLAMA
    True
    """
    return family_of(config).keymap


def file_keymap(config: DecoderConfig, names: Collection[str] = ()) -> Keymap:
    """How the tensors of a config's files are named; if ``names`` are those of modules, that.

    >>> from lora_jax.models.presets import TINY
    >>> file_keymap(TINY) is keymap_of(TINY)
    True
    """
    family = family_of(config)
    if family.files is None:
        return family.keymap
    first = {tensor_name(rule, (0,) * rule.stack) for rule in family.keymap.rules}
    own = first - {tensor_name(rule, (0,) * rule.stack) for rule in family.files.rules}
    return family.keymap if own & set(names) else family.files


def family_name(attributes: Found) -> str:
    """The family that a ``config.json`` names; ``llama`` where it names none.

    >>> family_name({"model_type": "minimind", "dim": 512})
    'minimind_first'
    """
    named = attributes.get("model_type", "llama")
    if named != "minimind":
        return named
    first, experts = "_first" * ("dim" in attributes), "_moe" * (attributes.get("use_moe") is True)
    return f"minimind{first}{experts}"


def model_type(name: str) -> str:
    """What ``config.json`` calls the family."""
    return "minimind" if name.startswith("minimind") else name
