"""The tokenizer that a GGUF file describes, rebuilt from its metadata."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from interop.tokenizer import ChatTokenizer, special_token, token_text, with_pad
from lora_jax.errors import InputError


class Preset(NamedTuple):
    """How a vocabulary wants its text cut before merging, and what its model does besides.

    ``ignore_merges`` takes a piece that is a token whole, without merging; ``add_bos`` holds
    where the file says nothing.
    """

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    """Cut into English clitics, words, ``numbers``, punctuation, line ends and spaces."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)

# By tokenizer.ggml.pre, as src/llama-vocab.cpp of llama.cpp defines it.
PRESETS = {
    "gpt-2": Preset((_GPT2,)),
    "smollm": Preset((_DIGITS, _GPT2)),
    "llama-bpe": Preset((_split(r"\p{N}{1,3}"), _BYTES), ignore_merges=True, add_bos=True),
    "qwen2": Preset((_split(r"\p{N}"), _BYTES), normalizers.NFC()),
}

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "padding_token_id",
    "unk": "unknown_token_id",
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def chat_tokenizer(metadata: Mapping[str, Any]) -> ChatTokenizer:
    """The tokenizer, chat template and special tokens of a GGUF file.

    Control tokens are special, user-defined ones are matched whole and kept in decoded text.

    Args:
      metadata: all values of the file by key, as `interop.gguf_file.open_gguf` gives them.

    Raises:
      InputError: a tokenizer other than byte-level BPE, a pre-tokenizer that isn't in
        `PRESETS`, or a vocabulary that doesn't hold together.
    """
    prefix = "tokenizer.ggml."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    _require_supported(values)
    preset = PRESETS[values["pre"]]
    tokenizer = Tokenizer(_byte_pair_model(values, preset.ignore_merges))
    if preset.normalizer is not None:
        tokenizer.normalizer = preset.normalizer  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(preset.steps))
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, values)
    special_tokens = with_pad(
        {role: token_text(tokenizer, values.get(key)) for role, key in _ID_KEYS.items()}
    )
    _add_ends(tokenizer, values, special_tokens, preset)
    eos_ids = tuple(dict.fromkeys(values[key] for key in _END_KEYS if key in values))
    template = metadata.get("tokenizer.chat_template", "")
    return ChatTokenizer(tokenizer, template, special_tokens, eos_ids)


def _require_supported(values: Mapping[str, Any]) -> None:
    wanted = {"model": ("gpt2",), "pre": tuple(PRESETS)}
    problems = [
        f"tokenizer.ggml.{key} is {values.get(key)!r}, known: {', '.join(known)}"
        for key, known in wanted.items()
        if values.get(key) not in known
    ]
    problems += [f"no tokenizer.ggml.{key}" for key in ("tokens", "merges") if key not in values]
    if problems:
        raise InputError("can't rebuild the tokenizer: " + "; ".join(problems))


def _byte_pair_model(values: Mapping[str, Any], ignore_merges: bool) -> models.BPE:
    tokens: list[str] = values["tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        repeated = [repr(token) for token, count in Counter(tokens).items() if count > 1]
        raise InputError(f"tokens that occur twice in the vocabulary: {', '.join(repeated)}")
    merges = [tuple(merge.split(" ")) for merge in values["merges"]]
    if odd := [" ".join(merge) for merge in merges if len(merge) != 2]:
        raise InputError(f"merges of other than two tokens: {odd[:5]}")
    try:
        return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"the merges don't fit the vocabulary: {error}") from error


def _add_tokens(tokenizer: Tokenizer, values: Mapping[str, Any]) -> None:
    tokens: list[str] = values["tokens"]
    kinds: Sequence[int] = values.get("token_type", [])
    whole = [t for t, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED]
    control = [t for t, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    tokenizer.add_special_tokens([special_token(token) for token in control])


def _add_ends(
    tokenizer: Tokenizer,
    values: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    preset: Preset,
) -> None:
    """Let encoding put BOS in front and EOS behind, where the file or the preset asks for it."""
    begins = values.get("add_bos_token", preset.add_bos) and special_tokens.get("bos")
    ends = values.get("add_eos_token", False) and special_tokens.get("eos")
    if begins or ends:
        around = [token for token in (begins, "$A", ends) if token]
        ids = [(token, tokenizer.token_to_id(token)) for token in around if token != "$A"]
        template = processors.TemplateProcessing(single=around, special_tokens=ids)
        tokenizer.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]
