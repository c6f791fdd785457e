"""Tokenizers rebuilt from GGUF metadata, against published definitions and transformers."""

import itertools
import json

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from interop import gguf
from interop.gguf_file import open_gguf
from interop.gguf_tokenizer import PRESETS, chat_tokenizer
from lora_jax.errors import InputError

from small_models import SMALL, random_params, write_gguf

TEXTS = [
    "",
    " ",
    "Hello, world! I'm, you're, WE'LL, it's 'quoted'.",
    "  two  spaces   three\tand\t\ttabs ",
    "lines\n\n\nand\r\nmore\r\r  \n  indented\n",
    "In 2024, 12345 items cost $1,000.50 (3.14159e-10); v2.0.1",
    "²³ ½ Ⅷ ٣٤٥ 一二三 123四 ①②",
    "naïve café cafe\u0301 Ångström ÅNGSTRÖM ﬁne",
    "東京は日本の首都です。 한국어 Привет, мир! שלום عالم नमस्ते",
    "🦜🏽 👨‍👩‍👧 🇫🇷 \u200b\u00a0\u3000\ufeff",
    "def f(x):\n    return x**2  # 99\n",
    "\x00\x01\x7f \ue000 \U0010ffff",
    "<|im_start|>user\nhi <|im_end|><|im_end|> <think>9 + 10</think> <|im_start>",
    "a" * 100 + "1" * 100 + " " * 100 + "\n" * 10,
]

# As src/llama-vocab.cpp of llama.cpp spells them; each stage cuts what the one before left.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CLITICS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STAGES = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_CLITICS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST],
    "qwen2": [_CLITICS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST],
}


def cut(text, patterns):
    """The pieces of a text: every match of a stage, and what lies between matches."""
    pieces = [text]
    for pattern in patterns:
        pieces = list(
            itertools.chain.from_iterable(
                regex.splititer(f"({pattern})", piece, flags=regex.V0) for piece in pieces
            )
        )
    return [piece for piece in pieces if piece]


def pieces_of(tokenizer, text):
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    spelled = tokenizer.pre_tokenizer.pre_tokenize_str(normal)
    return normal, [decoders.ByteLevel().decode([piece]) for piece, _ in spelled]


CONTROL = ["<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>"]


@pytest.fixture(scope="module")
def vocabulary():
    """A byte-level vocabulary with merges over every kind of text, numbers included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    plain = [text for text in TEXTS if "<think>" not in text]
    tokenizer.train_from_iterator(plain * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get) + CONTROL + USER_DEFINED
    return tokens, [" ".join(merge) for merge in model["merges"]]


@pytest.fixture
def metadata(vocabulary):
    tokens, merges = vocabulary
    kinds = [3 if t in CONTROL else 4 if t in USER_DEFINED else 1 for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.array(kinds),
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory, vocabulary):
    """A GGUF file per pre-tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizers")
    params = random_params(SMALL)
    for pre in PRESETS:
        tokenizer = (pre, *vocabulary, CONTROL, USER_DEFINED)
        write_gguf(directory / f"{pre}.gguf", SMALL, params, tokenizer=tokenizer)
    return directory


@pytest.mark.parametrize("pre", PRESETS)
def test_text_is_cut_as_llama_cpp_defines(metadata, pre):
    tokenizer = chat_tokenizer(metadata | {"tokenizer.ggml.pre": pre}).tokenizer
    for text in TEXTS:
        normal, pieces = pieces_of(tokenizer, text)
        assert pieces == cut(normal, STAGES[pre])


def test_no_two_definitions_cut_alike():
    for one, other in itertools.combinations(STAGES.values(), 2):
        assert any(cut(text, one) != cut(text, other) for text in TEXTS)


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_ids_are_those_of_transformers(directory, pre):
    path = directory / f"{pre}.gguf"
    ours = gguf.read_tokenizer(open_gguf(path)).tokenizer
    theirs = AutoTokenizer.from_pretrained(directory, gguf_file=path.name)
    if pre == "qwen2":  # transformers leaves out the normalizer when it reads a GGUF file
        theirs.backend_tokenizer.normalizer = Qwen2Tokenizer().backend_tokenizer.normalizer
    for text in TEXTS:
        # Neither BOS nor a piece taken whole: transformers knows of neither for llama-bpe.
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]


def test_transformers_does_not_split_the_digits_of_smollm(directory):
    """Why its conversion is no reference there, and that the digits are all that differs."""
    ours = gguf.read_tokenizer(open_gguf(directory / "smollm.gguf")).tokenizer
    theirs = AutoTokenizer.from_pretrained(directory, gguf_file="smollm.gguf").backend_tokenizer
    same = [ours.encode(text).ids == theirs.encode(text).ids for text in TEXTS]
    assert not all(same)
    for text in TEXTS:
        bare = regex.sub(r"\p{N}", "", text)
        assert ours.encode(bare).ids == theirs.encode(bare).ids
    theirs.pre_tokenizer = ours.pre_tokenizer
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids


@pytest.mark.parametrize("pre", PRESETS)
def test_decoding_gives_the_text_back(metadata, pre):
    tokenizer = chat_tokenizer(metadata | {"tokenizer.ggml.pre": pre}).tokenizer
    for text in TEXTS:
        normal, _ = pieces_of(tokenizer, text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == normal


def test_control_tokens_are_special_and_user_defined_ones_are_text(metadata):
    tokenizer = chat_tokenizer(metadata).tokenizer
    ids = tokenizer.encode("<|im_start|><think>x</think><|im_end|>").ids
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "<think>x</think>"


def test_special_tokens_and_ends(metadata):
    chat = chat_tokenizer(metadata | {"tokenizer.ggml.eot_token_id": 65})
    end = metadata["tokenizer.ggml.eos_token_id"]
    assert chat.special_tokens == {
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "pad": "<|im_end|>",
    }
    assert chat.eos_ids == (end, 65)
    assert chat.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("values", "begins", "ends"),
    [
        ({"pre": "smollm"}, False, False),
        ({"pre": "smollm", "add_bos_token": True}, True, False),
        ({"pre": "llama-bpe"}, True, False),
        ({"pre": "llama-bpe", "add_bos_token": False, "add_eos_token": True}, False, True),
    ],
)
def test_bos_and_eos_are_added_where_the_file_says_so(metadata, values, begins, ends):
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    tokenizer = chat_tokenizer(changed).tokenizer
    bare = tokenizer.encode("text", add_special_tokens=False).ids
    bos, eos = (metadata[f"tokenizer.ggml.{end}_token_id"] for end in ("bos", "eos"))
    assert tokenizer.encode("text").ids == [bos] * begins + bare + [eos] * ends


def test_llama_bpe_takes_a_piece_that_is_a_token_without_merging(metadata):
    tokens = metadata["tokenizer.ggml.tokens"]
    changed = metadata | {"tokenizer.ggml.tokens": [*tokens, "zqx"]}  # no merge makes it
    changed["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], 1)
    whole = {
        pre: chat_tokenizer(changed | {"tokenizer.ggml.pre": pre}).tokenizer.encode(
            "zqx", add_special_tokens=False
        )
        for pre in ("llama-bpe", "qwen2")
    }
    assert whole["llama-bpe"].tokens == ["zqx"]
    assert whole["qwen2"].tokens != ["zqx"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre is 'tekken', known: gpt-2, smollm"),
        ({"model": "llama"}, r"tokenizer\.ggml\.model is 'llama', known: gpt2"),
        ({"model": "t5", "pre": "x"}, r"model is 't5'.*; tokenizer\.ggml\.pre is 'x'"),
        ({"merges": ["a b c"]}, r"merges of other than two tokens: \['a b c'\]"),
        ({"merges": ["zz qq"]}, r"the merges don't fit the vocabulary"),
        ({"tokens": ["a", "b", "a"]}, r"occur twice in the vocabulary: 'a'"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(metadata, changes, fault):
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(InputError, match=fault):
        chat_tokenizer(changed)


def test_a_file_without_a_tokenizer_names_the_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL))
    with pytest.raises(InputError, match=r"a\.gguf: can't rebuild the tokenizer.*no tokenizer"):
        gguf.read_tokenizer(open_gguf(path))


def test_the_vocabulary_of_smollm2_was_learned_on_single_digits(smollm2_file):
    tokens = smollm2_file.metadata["tokenizer.ggml.tokens"]
    assert [t for t in tokens if regex.search(r"\p{N}\p{N}", t)] == []
    tokenizer = gguf.read_tokenizer(smollm2_file).tokenizer
    assert tokenizer.encode("12345").tokens == list("12345")
    assert tokenizer.get_vocab_size() == 49_152
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
