"""Tokenizers with what a chat needs besides: template, special tokens, end-of-text ids.

Read from Hugging Face directories, written so that ``transformers.AutoTokenizer`` reads the
same, and made from nothing for models of bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lora_jax.errors import InputError
from lora_jax.files import existing_file, read_json, write_text


class ChatTokenizer(NamedTuple):
    """A tokenizer and what goes with it.

    ``chat_template`` is Jinja source, empty where the model has none. ``special_tokens`` maps
    ``bos``, ``eos``, ``pad`` and ``unk`` to the tokens' text, as far as the model has them;
    ``pad`` is ``eos`` where the model names none. ``eos_ids`` are all ids that end an answer.
    """

    tokenizer: Tokenizer
    chat_template: str
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]


_ROLES = ("bos", "eos", "pad", "unk")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> ChatTokenizer:
    """A tokenizer that needs no vocabulary file: one token per UTF-8 byte, ids 0 to 255.

    The ids from 256 on are ``<|im_start|>``, ``<|im_end|>`` and ``<|endoftext|>``, and the chat
    template is ChatML.

    >>> byte_tokenizer().tokenizer.encode("<|im_start|>é").ids
    [256, 195, 169]
    """
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    start, end, pad = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    tokenizer.add_special_tokens([special_token(token) for token in (start, end, pad)])
    special_tokens = {"bos": start, "eos": end, "pad": pad}
    return ChatTokenizer(tokenizer, CHATML, special_tokens, eos_ids=(257,))


def read_tokenizer(directory: str | Path) -> ChatTokenizer:
    """The tokenizer of a Hugging Face directory.

    Reads ``tokenizer.json``; the template from ``chat_template.jinja`` or else from
    ``tokenizer_config.json``; special tokens from ``tokenizer_config.json`` and
    ``special_tokens_map.json``, or by the ids in ``generation_config.json`` and ``config.json``.

    Raises:
      InputError: no ``tokenizer.json``, or one that doesn't load.
    """
    directory = Path(directory)
    path = existing_file(directory / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = _merged(directory, "special_tokens_map.json", "tokenizer_config.json")
    ids = _merged(directory, "config.json", "generation_config.json")
    special_tokens = with_pad(
        {
            role: _text(names.get(f"{role}_token"))
            or token_text(tokenizer, next(iter(_listed(ids.get(f"{role}_token_id"))), None))
            for role in _ROLES
        }
    )
    template = _template(directory, names.get("chat_template"))
    eos_ids = [*_ids(tokenizer, special_tokens, "eos"), *_listed(ids.get("eos_token_id"))]
    return ChatTokenizer(tokenizer, template, special_tokens, tuple(dict.fromkeys(eos_ids)))


def write_tokenizer(directory: str | Path, chat: ChatTokenizer) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``.

    The token ids of ``generation_config.json`` are those of ``chat.special_tokens``; its
    ``eos_token_id`` lists all of ``chat.eos_ids``.
    """
    directory = Path(directory)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in chat.special_tokens.items()},
        **({"chat_template": chat.chat_template} if chat.chat_template else {}),
    }
    write_text(directory / "tokenizer.json", chat.tokenizer.to_str(pretty=True))
    write_text(directory / "tokenizer_config.json", _json(config))
    write_text(directory / "generation_config.json", _json(token_ids(chat)))


def token_ids(chat: ChatTokenizer) -> dict[str, int | list[int]]:
    """``bos_token_id``, ``eos_token_id`` (a list where there are several) and ``pad_token_id``.

    >>> token_ids(byte_tokenizer())
    {'bos_token_id': 256, 'eos_token_id': 257, 'pad_token_id': 258}
    """
    ids: dict[str, int | list[int]] = {
        f"{role}_token_id": token_id
        for role in ("bos", "eos", "pad")
        for token_id in _ids(chat.tokenizer, chat.special_tokens, role)
    }
    return ids | ({"eos_token_id": list(chat.eos_ids)} if len(chat.eos_ids) > 1 else {})


def token_text(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    """The text of a token, None for no id or one that the vocabulary doesn't have."""
    return None if token_id is None else tokenizer.id_to_token(token_id)


def with_pad(special_tokens: Mapping[str, str | None]) -> dict[str, str]:
    """The special tokens that there are, ``pad`` being ``eos`` where there is none."""
    filled = {**special_tokens, "pad": special_tokens.get("pad") or special_tokens.get("eos")}
    return {role: token for role, token in filled.items() if token}


def special_token(token: str) -> AddedToken:
    """A token that is matched as it stands and that decoding can leave out."""
    return AddedToken(token, normalized=False, special=True)


def _byte_vocabulary() -> dict[str, int]:
    """GPT-2's spelling of bytes as characters: printable Latin-1 as is, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: byte for byte in printable} | {b: 256 + n for n, b in enumerate(others)}
    return {chr(spelling[byte]): byte for byte in range(256)}


def _merged(directory: Path, *names: str) -> dict[str, Any]:
    """The objects of those files that are there, later ones winning."""
    files = [directory / name for name in names]
    return {key: v for file in files if file.is_file() for key, v in read_json(file).items()}


def _template(directory: Path, in_config: Any) -> str:
    """The chat template; of several named ones (a list in the config), the default one."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(in_config, list):
        return next((t["template"] for t in in_config if t["name"] == "default"), "")
    return in_config or ""


def _text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _listed(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _ids(tokenizer: Tokenizer, special_tokens: Mapping[str, str], role: str) -> list[int]:
    token = special_tokens.get(role)
    return _listed(tokenizer.token_to_id(token)) if token else []


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
