import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.chat import Encoded
from lora_jax.data.fitting import fit_rows
from lora_jax.data.packing import fullest_bins, pack_rows
from lora_jax.errors import InputError

VOCAB = 1000


def row(length: int, start: int = 0, trained_from: int = 1, place: str = "") -> Encoded:
    ids = np.arange(start, start + length, dtype=np.int32) % VOCAB
    return Encoded(ids, np.arange(length) >= trained_from, place)


def rows_of(lengths: list[int]) -> list[Encoded]:
    return [row(length, start=7 * i, place=f"a:{i}") for i, length in enumerate(lengths, start=1)]


LENGTHS = st.lists(st.integers(2, 24), min_size=1, max_size=40)
CAPACITY = st.integers(24, 60)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_every_item_lies_in_one_bin_and_no_bin_overflows(lengths, capacity):
    bins = fullest_bins(lengths, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in items) <= capacity for items in bins)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_no_two_bins_could_be_one(lengths, capacity):
    bins = fullest_bins(lengths, capacity)
    filled = sorted(sum(lengths[item] for item in items) for items in bins)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


@pytest.mark.parametrize(
    ("lengths", "capacity", "bins"),
    [
        ([], 8, []),
        ([8, 8], 8, [[0], [1]]),
        ([1, 7, 2, 6], 8, [[0, 1], [2, 3]]),
        ([4, 7, 5, 1], 9, [[1, 3], [0, 2]]),
        # First fit would put the 1 beside the 12.
        ([12, 10, 9, 1], 20, [[0, 3], [1, 2]]),
        # Best fit decreasing would take 4 bins: 6 3, 5 4, 4 3, 3.
        ([6, 5, 4, 4, 3, 3, 3], 10, [[0, 2], [1, 3], [4, 5, 6]]),
    ],
)
def test_known_packings(lengths, capacity, bins):
    assert fullest_bins(lengths, capacity) == bins


@settings(deadline=None)
@given(LENGTHS, CAPACITY)
def test_each_row_stands_whole_in_one_sequence_once(lengths, capacity):
    rows = rows_of(lengths)
    [packed] = pack_rows(rows, capacity, VOCAB)
    found = []
    for tokens, positions, segments, trained in zip(*packed, strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            assert np.ptp(np.flatnonzero(here)) == here.sum() - 1, "a row is one stretch"
            found.append((tokens[here].tolist(), trained[here].tolist()))
    assert sorted(found) == sorted((r.ids.tolist(), r.trained.tolist()) for r in rows)


@settings(deadline=None)
@given(LENGTHS, CAPACITY)
def test_padding_is_empty_and_at_the_end(lengths, capacity):
    [packed] = pack_rows(rows_of(lengths), capacity, VOCAB)
    padding = packed.segment_ids == 0
    assert (~padding).sum() == sum(lengths)
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    for leaf in packed:
        assert not leaf[padding].any()
    assert [leaf.dtype.name for leaf in packed] == ["int32", "int32", "int32", "bool"]
    assert all(leaf.shape == (len(padding), capacity) for leaf in packed)


@settings(deadline=None)
@given(LENGTHS, CAPACITY)
def test_packing_is_deterministic(lengths, capacity):
    [once], [twice] = (pack_rows(rows_of(lengths), capacity, VOCAB) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, twice, strict=True))


def test_rows_that_fit_pass_through():
    rows = rows_of([5, 10])
    assert fit_rows(rows, 10) == (tuple(rows), 0, 0, 0)


def test_long_rows_are_refused_with_count_longest_places_and_remedy():
    with pytest.raises(InputError) as caught:
        fit_rows(rows_of([5, *range(11, 18)]), 10)
    assert str(caught.value) == (
        "7 of 8 rows are longer than 10 tokens, the longest 17: a:2 (11), a:3 (12), a:4 (13), "
        "a:5 (14), a:6 (15), ...: pass --max-length 17, or --truncate drop|end|split"
    )


def test_long_rows_can_be_dropped():
    rows = rows_of([5, 11, 10, 12])
    fitted = fit_rows(rows, 10, "drop")
    assert [r.place for r in fitted.rows] == ["a:1", "a:3"]
    assert (fitted.dropped, fitted.cut) == (2, 0)


def test_long_rows_can_be_cut_at_the_end_and_lose_nothing_else():
    rows = [row(5, place="whole"), row(12, place="cut"), row(12, trained_from=10, place="gone")]
    fitted = fit_rows(rows, 10, "end")
    assert [r.place for r in fitted.rows] == ["whole", "cut"]
    assert fitted.rows[1].ids.tolist() == rows[1].ids[:10].tolist()
    assert fitted.rows[1].trained.tolist() == rows[1].trained[:10].tolist()
    assert (fitted.dropped, fitted.cut) == (1, 1)
    assert len(rows[1].ids) == 12, "the caller's rows are untouched"


@pytest.mark.parametrize("truncate", ["drop", "end"])
def test_losing_every_row_is_an_error(truncate):
    rows = [row(12, trained_from=11), row(20, trained_from=15)]
    with pytest.raises(InputError, match=r"no row of 2 .* 10 tokens: pass --max-length 20"):
        fit_rows(rows, 10, truncate)


@settings(deadline=None)
@given(st.integers(2, 12), st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_splitting_text_predicts_every_token_but_the_first_once(length, lengths):
    texts = [row(n, start=100 * i, trained_from=0) for i, n in enumerate(lengths)]
    fitted = fit_rows(texts, length, "split")

    def pairs(rows):
        return sorted(
            (int(r.ids[i]), int(r.ids[i + 1]))
            for r in rows
            for i in range(len(r.ids) - 1)
            if r.trained[i + 1]
        )

    assert pairs(fitted.rows) == pairs(texts)
    assert max(len(piece.ids) for piece in fitted.rows) <= length
    assert min(len(piece.ids) for piece in fitted.rows) >= min(2, *lengths)
    assert fitted.split == sum(n > length for n in lengths)
    assert sum(piece.trained.sum() for piece in fitted.rows) == sum(lengths)


def test_splitting_refuses_conversations():
    rows = [row(12, trained_from=0, place="text"), row(12, trained_from=3, place="chat")]
    with pytest.raises(InputError, match=r"1 of 1 rows are longer than 10 tokens.*chat \(12\)"):
        fit_rows(rows, 10, "split")


def test_an_unknown_policy_and_a_senseless_length_are_errors():
    with pytest.raises(InputError, match=r"'middle': pass --truncate error\|drop\|end\|split"):
        fit_rows([row(5)], 10, "middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="--max-length 2 or more"):
        fit_rows([row(5)], 1)


def test_packing_refuses_what_it_would_have_to_cut():
    with pytest.raises(InputError, match=r"1 of 2 rows are longer than 10 tokens.*a:2 \(11\)"):
        pack_rows(rows_of([5, 11]), 10, VOCAB)


@pytest.mark.parametrize("bad", [-1, 16, 99])
def test_ids_outside_the_vocabulary_are_refused(bad):
    good, wrong = row(4, start=12, place="a:1"), row(4, place="a:2")
    pack_rows([good, wrong], 10, vocab_size=16)
    wrong.ids[2] = bad
    with pytest.raises(InputError, match=rf"1 of 2 rows .*\[0, 16\).*tokenizer.*a:2: id {bad}"):
        pack_rows([good, wrong], 10, vocab_size=16)


@pytest.mark.parametrize("rows", [[], [row(4, trained_from=4)], [row(1, trained_from=0)]])
def test_no_trainable_token_is_an_error(rows):
    with pytest.raises(InputError, match=f"no token of {len(rows)} rows can be trained"):
        pack_rows(rows, 10, VOCAB)
