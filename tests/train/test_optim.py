"""AdamW, clipping, schedules, accumulation, LoRA+ and LoRA-FA against torch, step by step."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from lora_jax.adapter import Bias, DoraTriple, Full, LoraPair, Rows
from lora_jax.errors import InputError
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.optim import adamw, clip_by_global_norm, decays
from lora_jax.train.partition import labels, stop_gradients
from lora_jax.train.schedules import SCHEDULES, schedule
from lora_jax.train.step import init_state, make_step

torch = pytest.importorskip("torch")

STEPS, PEAK = 50, 1e-3
SIZES = {"first": (6, 16), "second": (16, 9)}
RANK = 3
TRAINER = {"hf_cosine": "cosine", "hf_linear": "linear", "hf_constant": "constant_with_warmup"}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Threads cost more than they save at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def make_problem(micro_batches=1):
    """Base, adapter, and a batch for each step with other token counts in each micro-batch."""
    rng = np.random.default_rng(7)
    base = {name: normal(rng, *size) / 2 for name, size in SIZES.items()}
    adapter = {
        name: LoraPair(normal(rng, n, RANK) / 2, normal(rng, RANK, m) / 4)
        for name, (n, m) in SIZES.items()
    }
    counts = itertools.cycle([8, 3, 5])
    batches = [
        [
            (normal(rng, 8, 6) / 2, rng.integers(0, 9, 8), np.float32(np.arange(8) < next(counts)))
            for _ in range(micro_batches)
        ]
        for _ in range(STEPS)
    ]
    return base, adapter, batches


def logits_of(base, adapter, x, tanh):
    hidden = tanh(x @ base["first"] + x @ adapter["first"][0] @ adapter["first"][1])
    return hidden @ base["second"] + hidden @ adapter["second"][0] @ adapter["second"][1]


def loss_fn(adapter, params, batch):
    x, targets, weights = batch
    return cross_entropy(logits_of(params, adapter, x, jnp.tanh), targets, weights)


def run_jax(tx, problem, *, accumulate=False, loss=loss_fn, step=None):
    base, adapter, batches = problem
    step = step or jax.jit(make_step(loss, tx, accumulate=accumulate))
    state = init_state(jax.tree.map(jnp.asarray, adapter), tx)
    trace = []
    for group in batches:
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *group)
        batch = stacked if accumulate else group[0]
        state, metrics = step(state, base, batch)
        trace.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(trace), state.adapter


def run_torch(problem, rate, *, clip=math.inf, b_ratio=1.0, frozen=(), **options):
    """The same in torch; ``rate(i)`` in float64 sets the learning rate of update i."""
    base, adapter, batches = problem
    base = {name: torch.tensor(leaf) for name, leaf in base.items()}
    factors = {name: tuple(map(torch.tensor, pair)) for name, pair in adapter.items()}
    groups = [
        {"params": [pair[i].requires_grad_() for pair in factors.values()], "ratio": ratio}
        for i, kind, ratio in ((0, "a", 1.0), (1, "b", b_ratio))
        if kind not in frozen
    ]
    optimizer = torch.optim.AdamW(groups, **options)
    trained = [p for group in groups for p in group["params"]]
    trace = []
    for i, group in enumerate(batches):
        for part in optimizer.param_groups:
            part["lr"] = rate(i) * part["ratio"]
        optimizer.zero_grad()
        tokens = sum(weights.sum() for *_, weights in group)
        total = 0.0
        for x, targets, weights in group:
            logits = logits_of(base, factors, torch.tensor(x), torch.tanh)
            each = torch.nn.functional.cross_entropy(
                logits, torch.tensor(targets), reduction="none"
            )
            loss = (each * torch.tensor(weights)).sum() / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        trace.append((total, norm.item()))
    return np.array(trace), {
        name: LoraPair(*(factor.detach().numpy() for factor in pair))
        for name, pair in factors.items()
    }


def trainer_rate(name, warmup):
    """The learning rates that `transformers` itself sets."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, STEPS)
    return lambda i: PEAK * scheduler.lr_lambdas[0](i)


def furthest(left, right):
    """Largest absolute difference between two trees."""
    differences = jax.tree.map(lambda l, r: float(np.abs(np.asarray(l) - r).max()), left, right)
    return max(jax.tree.leaves(differences))


def assert_equal_runs(ours, reference, tolerance=1e-5):
    assert furthest(ours, reference) < tolerance


def rate_of(name):
    return schedule(name, PEAK, STEPS, 0 if name == "minimind" else 5)


@functools.cache
def step_under_any_schedule(clip, accumulate):
    """One compilation for all schedules: the last argument is the number of the one in force."""
    rates = [rate_of(name) for name in SCHEDULES]

    def step(state, params, batch, which):
        tx = adamw(lambda count: lax.switch(which, rates, count), **options)
        return make_step(loss_fn, tx, accumulate=accumulate)(state, params, batch)

    options = {"weight_decay": 0.1, "clip_norm": clip}
    return adamw(rates[0], **options), jax.jit(step)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("clip", [math.inf, 0.3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_fifty_updates_equal_torchs(name, clip, micro_batches):
    problem = make_problem(micro_batches)
    tx, any_step = step_under_any_schedule(clip, micro_batches > 1)
    step = functools.partial(any_step, which=list(SCHEDULES).index(name))
    ours = run_jax(tx, problem, accumulate=micro_batches > 1, step=step)
    rate = trainer_rate(TRAINER[name], 5) if name in TRAINER else rate_of(name)
    reference = run_torch(problem, rate, clip=clip, weight_decay=0.1)
    assert_equal_runs(ours, reference)
    assert reference[0][:, 1].max() > 0.6, "the clipping does something"
    assert furthest(reference[1], problem[1]) > 0.01, "the run moves the adapter"


@pytest.mark.parametrize(
    ("change", "beyond"),
    [
        ({"weight_decay": 0.0}, 1e-3),
        ({"clip_norm": math.inf}, 1e-4),
        ({"b1": 0.8}, 1e-3),
        ({"b2": 0.99}, 1e-4),
        ({"learning_rate": schedule("hf_cosine", PEAK, STEPS, 5)}, 5e-4),
    ],
    ids=["decay", "clip", "b1", "b2", "schedule"],
)
def test_another_setting_is_told_apart(change, beyond):
    problem = make_problem()
    rate = schedule("cosine", PEAK, STEPS, 5)
    options = {"learning_rate": rate, "weight_decay": 0.1, "clip_norm": 0.3} | change
    ours = run_jax(adamw(**options), problem)
    reference = run_torch(problem, rate, clip=0.3, weight_decay=0.1)
    assert furthest(ours[1], reference[1]) > beyond


def test_defaults_are_torchs():
    problem = make_problem()
    ours = run_jax(adamw(lambda count: PEAK, clip_norm=math.inf), problem)
    assert_equal_runs(ours, run_torch(problem, lambda i: PEAK))


def test_weighting_micro_batches_equally_is_told_apart():
    problem = make_problem(3)

    def mean_of_means(adapter, params, batch):
        loss = loss_fn(adapter, params, batch)
        return LossSum(loss.total / loss.tokens, jnp.ones(()))

    rate = schedule("cosine", PEAK, STEPS)
    wrong = run_jax(adamw(rate), problem, accumulate=True, loss=mean_of_means)
    assert furthest(wrong[1], run_torch(problem, rate, clip=1.0)[1]) > 1e-3


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e3, math.inf])
def test_clipping_equals_torchs(limit):
    grads = {"w": jnp.asarray(normal(np.random.default_rng(0), 4, 5)), "v": jnp.full(3, 1e-4)}
    parameters = [torch.nn.Parameter(torch.zeros(leaf.shape)) for leaf in grads.values()]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = torch.tensor(np.asarray(grad))
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    clipped = clip_by_global_norm(limit).update(grads, optax.EmptyState())[0]
    for parameter, leaf in zip(parameters, (clipped[name] for name in grads), strict=True):
        np.testing.assert_allclose(leaf, parameter.grad.numpy(), rtol=3e-7)


def test_a_gradient_as_small_as_the_epsilon_is_clipped_as_torch_does():
    grads = {"w": jnp.full(4, 1e-6)}
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 1e-6)
    torch.nn.utils.clip_grad_norm_([parameter], 1e-6)
    ours = clip_by_global_norm(1e-6).update(grads, optax.EmptyState())[0]["w"]
    optaxs = optax.clip_by_global_norm(1e-6).update(grads, optax.EmptyState())[0]["w"]
    np.testing.assert_allclose(ours, parameter.grad.numpy(), rtol=1e-6)
    assert not np.allclose(optaxs, ours, rtol=0.1)


def test_lora_plus_is_pefts_optimizer():
    """Weights, batches and learning-rate ratio the same, optimizer built by PEFT."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    base, adapter, batches = problem = make_problem()
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(*size, bias=False) for name, size in SIZES.items()}
    )
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(SIZES))
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, layer in model.items():
            layer.base_layer.weight.copy_(torch.tensor(base[name]).T)
            layer.lora_A["default"].weight.copy_(torch.tensor(adapter[name].a).T)
            layer.lora_B["default"].weight.copy_(torch.tensor(adapter[name].b).T)
    optimizer = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=PEAK, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    for ((x, targets, weights),) in batches:
        logits = model["second"](torch.tanh(model["first"](torch.tensor(x))))
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
        optimizer.zero_grad()
        ((each * torch.tensor(weights)).sum() / weights.sum()).backward()
        optimizer.step()
    reference = {
        name: LoraPair(
            layer.lora_A["default"].weight.detach().numpy().T,
            layer.lora_B["default"].weight.detach().numpy().T,
        )
        for name, layer in model.items()
    }
    options = {"weight_decay": 0.1, "clip_norm": math.inf}
    _, ours = run_jax(adamw(lambda count: PEAK, b_ratio=8.0, **options), problem)
    _, plain = run_jax(adamw(lambda count: PEAK, **options), problem)
    assert_equal_runs(ours, reference, 2e-5)
    assert furthest(plain, reference) > 0.05


def test_lora_plus_under_clipping_and_a_schedule_equals_torchs_groups():
    problem, rate = make_problem(), schedule("hf_linear", PEAK, STEPS, 5)
    ours = run_jax(adamw(rate, b_ratio=4.0, clip_norm=0.3), problem)
    assert_equal_runs(ours, run_torch(problem, rate, b_ratio=4.0, clip=0.3))


def test_lora_fa_equals_torch_with_a_frozen():
    problem, rate = make_problem(), schedule("hf_cosine", PEAK, STEPS, 5)
    tx = adamw(rate, freeze=("a",), clip_norm=0.3, weight_decay=0.1)
    ours = run_jax(tx, problem, loss=stop_gradients(loss_fn, ("a",)))
    reference = run_torch(problem, rate, frozen=("a",), clip=0.3, weight_decay=0.1)
    assert_equal_runs(ours, reference)
    for name, pair in problem[1].items():
        np.testing.assert_array_equal(ours[1][name].a, pair.a)
    _, with_gradients = run_jax(tx, problem)
    assert_equal_runs(with_gradients, ours[1], 1e-6)


def test_lora_fa_keeps_no_state_and_computes_no_gradient_for_a():
    base, adapter, batches = make_problem()
    frozen = ("a",)
    rate = schedule("cosine", PEAK, STEPS)
    sizes = {"a": 0, "b": 0}
    for pair in adapter.values():
        sizes = {kind: sizes[kind] + getattr(pair, kind).size for kind in sizes}

    def held(tx):
        return sum(leaf.size for leaf in jax.tree.leaves(tx.init(adapter)))

    assert held(adamw(rate, freeze=frozen)) == 2 * sizes["b"] + 2
    assert held(adamw(rate)) == 2 * (sizes["a"] + sizes["b"]) + 2

    def flops(loss, tx):
        step = jax.jit(make_step(loss, tx))
        compiled = step.lower(init_state(adapter, tx), base, batches[0][0]).compile()
        return compiled.cost_analysis()["flops"]

    tx = adamw(rate, freeze=frozen)
    without, with_gradients = flops(stop_gradients(loss_fn, frozen), tx), flops(loss_fn, tx)
    rows = 8
    products = sum(2 * rows * n * RANK for n, _ in SIZES.values())
    assert with_gradients - without > products


def test_decay_leaves_out_norms_and_biases_that_are_trained_whole():
    one = jnp.ones(2)
    adapter = {
        "layers/norm/scale": Full(one),
        "layers/mlp/bias": Full(one),
        "ln_f/weight": Full(one),
        "head/kernel": Full(one),
        "norm_head/kernel": LoraPair(one, one),
        "q/kernel": DoraTriple(one, one, one),
        "embed": Rows((0, 2), one),
    }
    tx = adamw(0.1, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, adapter), tx.init(adapter), adapter)
    moved = {path: float(jax.tree.leaves(entry)[0][0]) for path, entry in updates.items()}
    still = {"layers/norm/scale", "layers/mlp/bias", "ln_f/weight"}
    assert {path for path, update in moved.items() if update == 0} == still
    assert moved["head/kernel"] == pytest.approx(-0.05)
    assert jax.tree.leaves(decays(adapter)).count(False) == 3


def test_labels_name_the_field_of_every_entry():
    one = jnp.ones(2)
    adapter = {
        "p": LoraPair(one, one), "d": DoraTriple(one, one, one), "f": Full(one),
        "r": Rows((1,), one), "c": Bias(one), "w": one,
    }  # fmt: skip
    found = labels(adapter)
    assert found["d"] == DoraTriple("a", "b", "m")
    assert (found["p"], found["f"]) == (LoraPair("a", "b"), Full("full"))
    assert found["r"].rows == "rows"
    assert found["c"] == Bias("bias")
    assert found["w"] == "base"


def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match=r"no such kind of factor: \['A'\]; the kinds are a, b"):
        adamw(0.1, freeze=("A",))
