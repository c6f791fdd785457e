"""A real byte-level BPE tokenizer, trained here in milliseconds: no download."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ADDED_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
SENTENCES = [
    "The capital of France is Paris, and that of Japan is Tokyo.",
    "system user assistant\n\nHello there!  Who are you?\nI am an assistant.",
    "def add(a, b):\n    return a + b\n",
    "one\n\n\ntwo\n\n\nthree",
    "caf\u00e9 na\u00efve \u6f22\u5b57 \u4f60\u597d",
]


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=ADDED_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_bpe()


@pytest.fixture(scope="session")
def trimming_tokenizer() -> Tokenizer:
    """As GPT-2's: its offsets leave out the spaces that its tokens begin with."""
    trimming = byte_level_bpe()
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    return trimming


@pytest.fixture(scope="session")
def special_tokens() -> dict[str, str]:
    return SPECIAL_TOKENS
