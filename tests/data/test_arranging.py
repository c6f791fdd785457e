"""How full sequences are, and that each row is there once, whatever the arrangement."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interop import pretrained
from lora_jax.data.arranging import MAX_BUCKETS, arrange_rows, bucket_lengths, shortest_length
from lora_jax.data.batch_plan import plan_batches
from lora_jax.data.chat import ChatFormat, Encoded, encode_rows
from lora_jax.data.fitting import fit_rows
from lora_jax.data.formats import read_rows
from lora_jax.data.packing import count_bins
from lora_jax.errors import InputError

import corpus

IDENTITY = Path(__file__).parents[2] / "examples" / "data" / "identity.jsonl"
PACKINGS = ["packed", "buckets", "padded"]
VOCAB = 4000


def row(length: int, index: int = 0) -> Encoded:
    return Encoded(np.full(length, index, np.int32), np.arange(length) > 0, f"a:{index}")


def rows_of(lengths) -> list[Encoded]:
    return [row(length, index) for index, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def docstrings():
    rows = corpus.docstring_rows()
    return encode_rows(corpus.chat_format(rows), rows)


@pytest.fixture(scope="module")
def identity():
    return encode_rows(corpus.chat_format(corpus.docstring_rows()), read_rows(IDENTITY))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.sampled_from(PACKINGS))
def test_every_row_is_there_once(lengths, packing):
    groups = arrange_rows(
        rows_of(lengths), packing=packing, max_length=40, vocab_size=VOCAB, sequences_per_step=3
    )
    found = [
        (group.tokens[s][group.segment_ids[s] == segment].tolist())
        for group in groups
        for s in range(len(group.tokens))
        for segment in range(1, group.segment_ids[s].max() + 1)
    ]
    assert sorted(found) == sorted([index] * length for index, length in enumerate(lengths))
    widths = [group.tokens.shape[1] for group in groups]
    assert widths == sorted(set(widths))
    assert len(groups) <= (MAX_BUCKETS if packing == "buckets" else 1)
    assert all(width == 40 or width % 8 == 0 for width in widths)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=60), st.integers(1, 5))
def test_the_shortest_length_costs_no_step_and_no_position(lengths, per_step):
    shortest = shortest_length(lengths, 90, per_step)

    def steps(length):
        return -(-count_bins(lengths, length) // per_step)

    assert max(lengths) <= shortest <= 90
    assert steps(shortest) == steps(90)


def positions(lengths, buckets, per_step) -> int:
    edges = [0, *buckets]
    counts = [
        sum(low < length <= high for length in lengths)
        for low, high in zip(edges, buckets, strict=False)
    ]
    return sum(-(-n // per_step) * per_step * b for n, b in zip(counts, buckets, strict=True))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 3))
def test_no_other_choice_of_buckets_has_fewer_positions(lengths, per_step, most):
    found = bucket_lengths(lengths, 64, per_step, most)
    choices = sorted({-(-length // 8) * 8 for length in lengths})
    best = min(
        positions(lengths, chosen, per_step)
        for k in range(1, most + 1)
        for chosen in combinations(choices, k)
        if chosen[-1] == choices[-1]
    )
    assert positions(lengths, found, per_step) == best


def filled(rows, packing, max_length, batch_size):
    groups = arrange_rows(
        rows,
        packing=packing,
        max_length=max_length,
        vocab_size=VOCAB,
        sequences_per_step=batch_size,
    )
    return plan_batches(groups, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("max_length", [256, 512])
def test_packed_identity_rows_are_at_least_95_percent_tokens(identity, max_length, batch_size):
    plan = filled(identity, "packed", max_length, batch_size)
    assert plan.padding_share <= 0.05, str(plan)
    assert filled(identity, "padded", max_length, batch_size).padding_share > 0.3


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("max_length", [256, 512, 1024])
def test_packed_docstrings_are_at_least_95_percent_tokens_in_half_the_positions(
    docstrings, max_length, batch_size
):
    rows = fit_rows(docstrings, max_length, "drop").rows
    lengths = [len(each.ids) for each in rows]
    assert np.mean(lengths) < max(lengths) / 3, "what is compared is a corpus of short rows"
    packed, buckets, padded = (filled(rows, p, max_length, batch_size) for p in PACKINGS)
    assert packed.padding_share <= 0.05, str(packed)
    assert packed.positions <= padded.positions / 2
    assert packed.positions <= buckets.positions <= padded.positions / 2
    assert packed.tokens == buckets.tokens == padded.tokens
    assert packed.trained_tokens == buckets.trained_tokens == padded.trained_tokens


@pytest.mark.parametrize("batch_size", [1, 2])
def test_packed_identity_rows_are_full_for_the_real_tokenizer_too(batch_size):
    base = pretrained.load("smollm2-135m")
    names = {f"{role}_token": text for role, text in base.special_tokens.items()}
    chat_format = ChatFormat(base.tokenizer, base.chat_template, names)
    rows = encode_rows(chat_format, read_rows(IDENTITY))
    groups = arrange_rows(
        rows, max_length=256, vocab_size=base.config.vocab_size, sequences_per_step=batch_size
    )
    plan = plan_batches(groups, batch_size=batch_size)
    assert plan.padding_share <= 0.05, str(plan)


def test_an_unknown_packing_is_refused():
    with pytest.raises(InputError, match=r"'dense': pass --packing packed\|buckets\|padded"):
        arrange_rows([row(4)], packing="dense", max_length=8, vocab_size=VOCAB)  # pyright: ignore


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_arrangement_checks_the_rows(packing):
    options = {"packing": packing, "max_length": 8, "vocab_size": 10}
    with pytest.raises(InputError, match="1 of 1 rows are longer than 8 tokens"):
        arrange_rows([row(9)], **options)
    with pytest.raises(InputError, match=r"outside the model's vocabulary \[0, 10\)"):
        arrange_rows([row(4, index=10)], **options)
    with pytest.raises(InputError, match="no token of 0 rows can be trained"):
        arrange_rows([], **options)
