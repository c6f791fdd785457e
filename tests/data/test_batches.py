import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import batches as batches_module
from lora_jax.data.arranging import arrange_rows
from lora_jax.data.batch_plan import plan_batches
from lora_jax.data.batches import (
    Batch,
    digest,
    eval_batches,
    example_batches,
    train_batches,
    train_dataset,
)
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
BUCKETS = arrange_rows(ROWS, packing="buckets", max_length=24, vocab_size=VOCAB)
GROUPS = {"packed": PACKED, "buckets": BUCKETS}


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


def content(batches) -> str:
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
    n = plan.shapes[0].predictions
    assert n % 32 == 0
    assert shapes == {
        ((((3, 24), "int32"),) * 3 + (((n,), "int32"), ((n,), "int32"), ((n,), "float32")))
    }


def test_entries_that_fill_up_have_no_weight():
    plan = plan_batches(PACKED, batch_size=3)
    for batch in eval_batches(PACKED, plan):
        real = int(batch.weights.sum())
        assert batch.weights.tolist() == [1.0] * real + [0.0] * (plan.shapes[0].predictions - real)
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
        assert group.weights.shape == (accumulate, parts.shapes[0].predictions)
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
    in_order = [tokens.tobytes() for tokens in PACKED[0].tokens]
    assert all(sorted(epoch) == sorted(in_order) for epoch in epochs)
    assert len({tuple(order) for order in [in_order, *epochs]}) == 4


def test_the_seed_decides_the_order_and_longer_runs_begin_alike():
    plan = plan_batches(PACKED, batch_size=2, epochs=2)
    first, again, other = (content(train_batches(PACKED, plan, seed=s)) for s in (3, 3, 4))
    assert first == again != other
    longer = plan_batches(PACKED, batch_size=2, epochs=5)
    begin = list(train_batches(PACKED, longer, seed=3))[: plan.steps]
    assert content(begin) == first


def test_evaluation_keeps_the_order():
    plan = plan_batches(PACKED, batch_size=2)
    assert sequences(eval_batches(PACKED, plan)) == [t.tobytes() for t in PACKED[0].tokens]


@pytest.mark.parametrize("accumulate", [None, 2])
def test_buckets_see_every_sequence_once_an_epoch_in_a_few_shapes(accumulate):
    plan = plan_batches(BUCKETS, batch_size=3, epochs=3, accumulate=accumulate)
    assert 1 < len(plan.shapes) <= 4
    batches = list(train_batches(BUCKETS, plan, seed=3))
    assert len(batches) == plan.steps
    assert {batch.tokens.shape for batch in batches} == {
        batch.tokens.shape for batch in example_batches(BUCKETS, plan)
    }
    per_epoch = plan.steps_per_epoch
    epochs = [batches[i : i + per_epoch] for i in range(0, plan.steps, per_epoch)]
    for epoch in epochs:
        micro = epoch if accumulate is None else [m for batch in epoch for m in unstacked(batch)]
        pairs = [pair for batch in micro for pair in predicted(batch)]
        assert sorted(pairs) == sorted(expected_predictions(ROWS))
    orders = {tuple(batch.tokens.shape for batch in epoch) for epoch in epochs}
    assert len(orders) > 1, "the lengths are mixed anew in each epoch"


def dealt(batch: Batch, own) -> Batch:
    return Batch(*(leaf[list(own)] for leaf in batch))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("owners", [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(3,), (0,), (1, 2)]])
def test_what_processes_build_is_their_part_of_the_batch_that_one_builds(groups, owners):
    groups = GROUPS[groups]
    plan = plan_batches(groups, batch_size=2, epochs=2, accumulate=4)
    for own in owners:
        batches = train_batches(groups, plan, seed=3), train_batches(groups, plan, seed=3, own=own)
        for whole, part in zip(*batches, strict=True):
            assert content([dealt(whole, own)]) == content([part])
        evaluated = eval_batches(groups, plan), eval_batches(groups, plan, own=own)
        for whole, part in zip(*evaluated, strict=True):
            assert content([dealt(whole, own)]) == content([part])


def test_a_process_reads_none_of_the_others_sequences(monkeypatch):
    read = []

    class Noted(np.ndarray):
        def __getitem__(self, index):
            read.extend(index.tolist() if isinstance(index, np.ndarray) else [])
            return np.asarray(self)[index]

    source_of = batches_module._source
    monkeypatch.setattr(
        batches_module,
        "_source",
        lambda group: source_of(group)._replace(tokens=group.tokens.view(Noted)),
    )
    plan = plan_batches(PACKED, batch_size=1, accumulate=4)
    for own in ((0, 1), (2, 3)):
        list(train_batches(PACKED, plan, seed=3, own=own))
        assert len(read) <= plan.sequences // 2 + 2
        read.clear()
    list(train_batches(PACKED, plan, seed=3))
    assert sorted(read) == list(range(plan.sequences))


def test_micro_batches_that_are_not_there_are_refused():
    plan = plan_batches(PACKED, batch_size=2, accumulate=2)
    for own in ((2,), (-1, 0), ()):
        with pytest.raises(InputError, match="this process's micro-batches by number, 0 to 1"):
            train_batches(PACKED, plan, seed=0, own=own)
    single = plan_batches(PACKED, batch_size=2)
    with pytest.raises(InputError, match="can't be shared"):
        train_batches(PACKED, single, seed=0, own=(0,))


ENVIRONMENTS = [
    {"PYTHONHASHSEED": "1", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def fingerprints() -> list[str]:
    """Of every batch from each position of an iterator that was restored there, and digests."""
    found = []
    for groups in GROUPS.values():
        plan = plan_batches(groups, batch_size=2, epochs=2, accumulate=2)
        iterator = train_batches(groups, plan, seed=9)
        found += [digest(groups, plan, seed=9)]
        for _ in range(plan.steps):
            fresh = train_batches(groups, plan, seed=9)
            fresh.set_state(json.loads(json.dumps(iterator.get_state())))
            found.append(content([next(fresh), next(iterator)]))
    return found


def test_batches_and_states_do_not_depend_on_the_environment():
    paths = [str(HERE.parents[1]), str(HERE)]
    code = f"import sys; sys.path[:0] = {paths}; import test_batches as t; print(t.fingerprints())"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in ENVIRONMENTS
    ]
    printed = {process.communicate()[0] for process in running}
    assert printed == {f"{fingerprints()}\n"}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_iterator_resumes_at_every_batch(groups, prefetch):
    plan = plan_batches(GROUPS[groups], batch_size=4, epochs=2)
    options = {"seed": 3, "prefetch": prefetch}
    grain.experimental.assert_equal_output_after_checkpoint(
        train_dataset(GROUPS[groups], plan, **options)
    )
    whole = [content([batch]) for batch in train_batches(GROUPS[groups], plan, **options)]
    assert len(whole) == len(set(whole)) == plan.steps, "no two batches are alike"
    iterator = train_batches(GROUPS[groups], plan, **options)
    for step in range(plan.steps):
        fresh = train_batches(GROUPS[groups], plan, **options)
        fresh.set_state(json.loads(json.dumps(iterator.get_state())))
        assert [content([batch]) for batch in fresh] == whole[step:]
        next(iterator)
    assert isinstance(iterator, grain.DatasetIterator)


def test_a_state_can_be_restored_in_another_number_of_processes():
    plan = plan_batches(PACKED, batch_size=2, epochs=2, accumulate=2)
    single = train_batches(PACKED, plan, seed=3)
    next(single)
    halves = [train_batches(PACKED, plan, seed=3, own=(i,)) for i in range(2)]
    for half in halves:
        half.set_state(single.get_state())
    whole = next(single)
    for number, half in enumerate(halves):
        assert content([next(half)]) == content([dealt(whole, (number,))])


def test_prefetching_changes_no_batch():
    plan = plan_batches(PACKED, batch_size=2, epochs=3)
    ahead = content(train_batches(PACKED, plan, seed=3, prefetch=3))
    assert ahead == content(train_batches(PACKED, plan, seed=3))


def test_the_order_of_batches_is_that_of_earlier_releases():
    """If this changes, resumed runs would see other batches: raise ``BATCHES_VERSION``."""
    rows = [Encoded(np.full(n, n, np.int32), np.arange(n) > 0) for n in range(3, 14)]
    groups = arrange_rows(rows, packing="packed", max_length=24, vocab_size=VOCAB)
    plan = plan_batches(groups, batch_size=1, epochs=2)
    first_tokens = [batch.tokens[0, 0].item() for batch in train_batches(groups, plan, seed=3)]
    assert first_tokens == [3, 5, 11, 6, 6, 5, 3, 11]
    assert digest(groups, plan, seed=3)[:16] == "2b64d4b8a25036f8"


def test_the_digest_tells_apart_whatever_changes_batches():
    def of(rows=ROWS, packing="packed", length=24, seed=3, **plan):
        groups = arrange_rows(rows, packing=packing, max_length=length, vocab_size=VOCAB)
        return digest(groups, plan_batches(groups, **{"batch_size": 2} | plan), seed=seed)

    other_id = [ROWS[0]._replace(ids=ROWS[0].ids + 1), *ROWS[1:]]
    other_mask = [ROWS[0]._replace(trained=~ROWS[0].trained), *ROWS[1:]]
    changed = [
        of(other_id), of(other_mask), of(ROWS[::-1]), of(ROWS[1:]), of(packing="padded"),
        of(packing="buckets"), of(length=40), of(seed=4), of(batch_size=4), of(accumulate=2),
    ]  # fmt: skip
    assert len({of(), *changed}) == 1 + len(changed)
    moved = [row._replace(place=f"elsewhere:{i}") for i, row in enumerate(ROWS)]
    assert of() == of(moved) == of(epochs=7)


def test_a_batch_larger_than_the_data_is_told_in_the_plan():
    assert "stay empty" not in str(plan_batches(PACKED, batch_size=2))
    plan = plan_batches(PACKED, batch_size=16, accumulate=2)
    assert str(plan).endswith(
        f"; a step has room for 32, so {32 - plan.sequences} stay empty in every epoch: lower "
        "--batch-size or --accumulate"
    )
    assert plan.steps_per_epoch == 1


def test_no_sequence_at_all_is_an_error():
    with pytest.raises(InputError, match="there is no sequence"):
        plan_batches((), batch_size=1)


def test_the_plan_counts_rows_tokens_and_steps():
    plan = plan_batches(PACKED, batch_size=3, accumulate=2, epochs=5)
    assert plan.rows == len(ROWS)
    assert plan.tokens == sum(len(row.ids) for row in ROWS)
    assert plan.trained_tokens == len(expected_predictions(ROWS))
    assert plan.sequences == len(PACKED[0].tokens)
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
        (shape,) = plan_batches(PACKED, batch_size=size).shapes
        assert 0 <= shape.predictions - most < 32


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
        "lora_jax.data.batches, lora_jax.data.preview, lora_jax.data.arranging, "
        "lora_jax.data.fitting, lora_jax.data.files; "
        "print({'jax', 'grain', 'torch', 'transformers', 'rich', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
