import hashlib
import os
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.batches import Batch, eval_batches, plan_batches, train_batches
from lora_jax.data.chat import Encoded
from lora_jax.data.packing import pack_rows
from lora_jax.errors import InputError

HERE = Path(__file__).parent
VOCAB = 500


def rows_of(lengths: list[int], seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    return [
        Encoded(rng.integers(1, VOCAB, n, dtype=np.int32), rng.random(n) < 0.5) for n in lengths
    ]


ROWS = rows_of([5, 9, 13, 2, 7, 11, 3, 12, 6, 8, 10, 4] * 2)
PACKED = pack_rows(ROWS, 24, VOCAB)


def predicted(batch: Batch) -> list[tuple[int, int]]:
    """(token, next token) of every weighted prediction of a batch without micro-batches."""
    real = batch.weights > 0
    before = batch.tokens.reshape(-1)[batch.predict_at[real]]
    return list(zip(before.tolist(), batch.targets[real].tolist(), strict=True))


def expected_predictions(rows: list[Encoded]) -> list[tuple[int, int]]:
    return [
        (int(row.ids[i]), int(row.ids[i + 1]))
        for row in rows
        for i in range(len(row.ids) - 1)
        if row.trained[i + 1]
    ]


def unstacked(batch: Batch) -> list[Batch]:
    return [Batch(*leaves) for leaves in zip(*batch, strict=True)]


def digest(batches) -> str:
    return hashlib.sha256(b"".join(leaf.tobytes() for b in batches for leaf in b)).hexdigest()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(2, 20), min_size=1, max_size=25),
    st.integers(20, 50),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_an_epoch_predicts_each_trained_token_of_each_row_once(lengths, capacity, size, seed):
    rows = rows_of(lengths)
    rows[0].trained[1] = True
    packed = pack_rows(rows, capacity, VOCAB)
    plan = plan_batches(packed, batch_size=size)
    for batches in (train_batches(packed, plan, seed=seed), eval_batches(packed, plan)):
        pairs = [pair for batch in batches for pair in predicted(batch)]
        assert sorted(pairs) == sorted(expected_predictions(rows))


def test_no_prediction_crosses_a_row():
    plan = plan_batches(PACKED, batch_size=3)
    for batch in eval_batches(PACKED, plan):
        at = batch.predict_at[batch.weights > 0]
        segments, positions = batch.segment_ids.reshape(-1), batch.positions.reshape(-1)
        assert (segments[at] > 0).all()
        assert (segments[at] == segments[at + 1]).all()
        assert (positions[at] + 1 == positions[at + 1]).all()


def test_all_batches_of_all_epochs_have_one_shape():
    plan = plan_batches(PACKED, batch_size=3, epochs=4)
    shapes = {
        tuple((leaf.shape, leaf.dtype.name) for leaf in batch)
        for batch in train_batches(PACKED, plan, seed=1)
    }
    n = plan.predictions
    assert n % 32 == 0
    assert shapes == {
        ((((3, 24), "int32"),) * 3 + (((n,), "int32"), ((n,), "int32"), ((n,), "float32")))
    }


def test_entries_that_fill_up_have_no_weight():
    plan = plan_batches(PACKED, batch_size=3)
    for batch in eval_batches(PACKED, plan):
        real = int(batch.weights.sum())
        assert batch.weights.tolist() == [1.0] * real + [0.0] * (plan.predictions - real)
        assert not batch.predict_at[real:].any()
        assert not batch.targets[real:].any()
        assert batch.predict_at.max() < batch.tokens.size - 1


def test_the_last_batch_of_an_epoch_is_kept_and_filled_with_empty_sequences():
    size = 5
    plan = plan_batches(PACKED, batch_size=size)
    left = plan.sequences % size
    assert left, "the case needs a short last group"
    last = list(eval_batches(PACKED, plan))[-1]
    assert last.segment_ids[:left].any(axis=1).all()
    assert not any(leaf[left:].any() for leaf in last[:3])
    assert last.weights.sum() > 0


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_micro_batches_hold_the_same_sequences_as_one_large_batch(accumulate):
    whole = plan_batches(PACKED, batch_size=2 * accumulate, epochs=2)
    parts = plan_batches(PACKED, batch_size=2, accumulate=accumulate, epochs=2)
    assert whole.steps == parts.steps
    for large, group in zip(
        train_batches(PACKED, whole, seed=5), train_batches(PACKED, parts, seed=5), strict=True
    ):
        assert group.tokens.shape == (accumulate, 2, 24)
        assert group.weights.shape == (accumulate, parts.predictions)
        assert group.tokens.reshape(-1, 24).tolist() == large.tokens.tolist()
        pairs = [pair for micro in unstacked(group) for pair in predicted(micro)]
        assert pairs == predicted(large)


def sequences(batches) -> list[bytes]:
    return [
        tokens.tobytes()
        for batch in batches
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True)
        if segments.any()
    ]


def test_each_epoch_sees_every_sequence_once_in_its_own_order():
    plan = plan_batches(PACKED, batch_size=2, epochs=3)
    batches = list(train_batches(PACKED, plan, seed=3))
    assert len(batches) == plan.steps == 3 * plan.steps_per_epoch
    per_epoch = plan.steps_per_epoch
    epochs = [sequences(batches[i : i + per_epoch]) for i in range(0, plan.steps, per_epoch)]
    in_order = [tokens.tobytes() for tokens in PACKED.tokens]
    assert all(sorted(epoch) == sorted(in_order) for epoch in epochs)
    assert len({tuple(order) for order in [in_order, *epochs]}) == 4


def test_the_seed_decides_the_order_and_longer_runs_begin_alike():
    plan = plan_batches(PACKED, batch_size=2, epochs=2)
    first, again, other = (digest(train_batches(PACKED, plan, seed=s)) for s in (3, 3, 4))
    assert first == again != other
    longer = plan_batches(PACKED, batch_size=2, epochs=5)
    begin = list(train_batches(PACKED, longer, seed=3))[: plan.steps]
    assert digest(begin) == first


def test_evaluation_keeps_the_order():
    plan = plan_batches(PACKED, batch_size=2)
    assert sequences(eval_batches(PACKED, plan)) == [t.tobytes() for t in PACKED.tokens]


def test_batches_do_not_depend_on_the_hash_seed():
    code = (
        f"import sys; sys.path[:0] = {[str(HERE.parents[1]), str(HERE)]}; "
        "import test_batches as t; "
        "plan = t.plan_batches(t.PACKED, batch_size=2, epochs=3, accumulate=2); "
        "print(t.digest(t.train_batches(t.PACKED, plan, seed=9)))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    plan = plan_batches(PACKED, batch_size=2, epochs=3, accumulate=2)
    assert digests == {digest(train_batches(PACKED, plan, seed=9)) + "\n"}


def test_the_iterator_resumes_at_every_batch():
    plan = plan_batches(PACKED, batch_size=2, epochs=2)
    whole = [digest([batch]) for batch in train_batches(PACKED, plan, seed=3)]
    iterator = train_batches(PACKED, plan, seed=3)
    for step in range(plan.steps):
        state = iterator.get_state()
        fresh = train_batches(PACKED, plan, seed=3)
        fresh.set_state(state)
        assert [digest([batch]) for batch in fresh] == whole[step:]
        next(iterator)
    assert isinstance(iterator, grain.DatasetIterator)


def test_the_plan_counts_rows_tokens_and_steps():
    plan = plan_batches(PACKED, batch_size=3, accumulate=2, epochs=5)
    assert plan.rows == len(ROWS)
    assert plan.tokens == sum(len(row.ids) for row in ROWS)
    assert plan.trained_tokens == len(expected_predictions(ROWS))
    assert plan.sequences == len(PACKED.tokens)
    assert plan.steps_per_epoch == -(-plan.sequences // 6)
    assert plan.steps == 5 * plan.steps_per_epoch
    computed = plan.steps_per_epoch * 6 * 24
    assert plan.padding_share == pytest.approx(1 - plan.tokens / computed)
    assert f"{plan.rows} rows, {plan.tokens} tokens, {plan.trained_tokens} trained" in str(plan)


def test_the_fixed_number_of_predictions_is_enough_for_any_batch_but_not_more():
    single = plan_batches(PACKED, batch_size=1)
    counts = [int(batch.weights.sum()) for batch in eval_batches(PACKED, single)]
    for size in (1, 2, 3):
        most = sum(sorted(counts)[-size:])
        assert 0 <= plan_batches(PACKED, batch_size=size).predictions - most < 32


def test_counts_below_one_and_bad_seeds_are_errors_together():
    with pytest.raises(InputError, match="batch_size is 0, epochs is -1, accumulate is 0: pass 1"):
        plan_batches(PACKED, batch_size=0, epochs=-1, accumulate=0)
    plan = plan_batches(PACKED, batch_size=1)
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=f"seed is {seed}: pass --seed 0 to"):
            train_batches(PACKED, plan, seed=seed)


def test_importing_the_data_modules_imports_neither_jax_nor_grain():
    code = (
        "import sys; import lora_jax.data.formats, lora_jax.data.chat, lora_jax.data.packing, "
        "lora_jax.data.batches, lora_jax.data.preview; "
        "print({'jax', 'grain', 'torch', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
