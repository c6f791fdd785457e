"""Learning rates against their references, on the host to 1e-9 and inside a step in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.train.schedules import SCHEDULES, schedule, warmup_updates

PEAK = 3e-4
TRAINER = {"hf_cosine": "cosine", "hf_linear": "linear", "hf_constant": "constant_with_warmup"}
MINIMIND = ["0.00050225", "0.00037725", "0.00022275", "0.00009775", "0.00005000"]
"""What the notebook prints: five epochs of one update, 5e-4."""


def trainer_trace(name, steps, warmup, **options):
    """Rates that `transformers` sets before each of ``steps`` updates."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(
        name, optimizer, warmup, steps, scheduler_specific_kwargs=options
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def furthest(ours, reference):
    """Largest difference as a share of the peak."""
    return np.abs(np.asarray(ours) - reference).max() / PEAK


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (7, 7), (200, 0), (1000, 33)])
@pytest.mark.parametrize("name", TRAINER)
def test_trainers_rates_to_1e_9_of_the_peak(name, steps, warmup):
    reference = trainer_trace(TRAINER[name], steps, warmup)
    rate = schedule(name, PEAK, steps, warmup)
    assert furthest(rate(np.arange(steps)), reference) < 1e-9
    assert furthest([rate(i) for i in range(steps)], reference) < 1e-9
    inside = jax.jit(jax.vmap(rate))(jnp.arange(steps))
    assert inside.dtype == jnp.float32
    assert furthest(inside, reference) < 3e-7


def test_trainers_rates_start_from_zero_and_ours_do_not():
    reference = trainer_trace("cosine", 100, 10)
    assert reference[0] == schedule("hf_cosine", PEAK, 100, 10)(0) == 0
    ours = schedule("cosine", PEAK, 100, 10)(np.arange(100))
    assert ours[0] == pytest.approx(PEAK / 10)
    assert furthest(ours, reference) > 1e-2


def test_floor_is_trainers_minimum():
    reference = trainer_trace("cosine_with_min_lr", 120, 12, min_lr_rate=0.15)
    ours = schedule("hf_cosine", PEAK, 120, 12, floor=0.15)(np.arange(120))
    assert furthest(ours, reference) < 1e-9
    assert furthest(schedule("hf_cosine", PEAK, 120, 12)(np.arange(120)), reference) > 0.1


@pytest.mark.parametrize(("share", "steps"), [(0.1, 25), (0.07, 100), (0.03, 1), (0.5, 9)])
def test_warmup_as_a_share_is_trainers(share, steps):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments("unused", warmup_steps=share, use_cpu=True)
    assert warmup_updates(share, steps) == arguments.get_warmup_steps(steps)
    by_share = schedule("cosine", PEAK, steps, share)(np.arange(steps))
    by_count = schedule("cosine", PEAK, steps, warmup_updates(share, steps))(np.arange(steps))
    np.testing.assert_array_equal(by_share, by_count)


def test_minimind_prints_the_notebooks_rates():
    rates = schedule("minimind", 5e-4, steps=5)(np.arange(5))
    assert [f"{rate:.8f}" for rate in rates] == MINIMIND
    t, total = 700, 1000
    stated = PEAK / 10 + 0.5 * PEAK * (1 + math.cos(math.pi * t / total))
    assert abs(schedule("minimind", PEAK, total)(t - 1) - stated) < 1e-9 * PEAK


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warmup_reaches_the_peak_and_the_rest_falls_to_the_floor(name):
    floor = 0.0 if name == "constant" else 0.1
    values = schedule(name, 1.0, steps=20, warmup=4, floor=floor)(np.arange(25))
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    assert (np.diff(values[4:]) <= 0).all()
    np.testing.assert_allclose(values[20:], 1.0 if name == "constant" else 0.1)
    assert schedule(name, 1.0, steps=20)(0) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_update_is_enough_for_every_schedule(name):
    assert np.isfinite(schedule(name, PEAK, 1)(np.arange(3))).all()


def test_bad_input_is_named_all_at_once():
    with pytest.raises(InputError) as error:
        schedule("cosin", -1.0, 0, warmup=1.5, floor=2)
    for part in ("'cosin'", "'cosine'", "-1.0", "steps is 0", "warmup is 1.5", "floor is 2"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="warmup is 11"):
        schedule("cosine", PEAK, 10, warmup=11)
    with pytest.raises(InputError, match="has no warm-up"):
        schedule("minimind", PEAK, 10, warmup=1)
    with pytest.raises(InputError, match="has no floor"):
        schedule("hf_constant", PEAK, 10, floor=0.1)
    with pytest.raises(InputError, match="nan"):
        schedule("cosine", math.nan, 10)
