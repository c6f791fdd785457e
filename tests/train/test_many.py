"""Adapters trained together end as each does alone, over a base that is there once."""

import functools
import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from interop import pretrained
from lora_jax.models.decoder import Decoder
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.many import Trained, evaluate_many, init_many, many_step, train_many
from lora_jax.train.members import Member, join
from lora_jax.train.optim import adamw
from lora_jax.train.precision import FLOAT32, PRECISIONS
from lora_jax.train.schedules import schedule
from lora_jax.train.step import init_state, make_step

import tiny_task

UPDATES = 12

init = jax.jit(lora.init, static_argnums=2)


@functools.cache
def compiled(loss_of, optimizer, plan, policy=FLOAT32):
    """One member's update, for every learning rate."""
    loss_fn = loss_of(plan)

    def step(learning_rate, state, params, batch):
        return make_step(loss_fn, optimizer(learning_rate), policy=policy)(state, params, batch)

    return jax.jit(step)


def alone(loss_of, optimizer, params, member, batches, policy=FLOAT32):
    """The member in a run of its own, on its own plan, of its own rank and scale."""
    state = init_state(member.adapter, optimizer(member.learning_rate), policy)
    step, log = compiled(loss_of, optimizer, member.plan, policy), []
    for batch in batches:
        state, metrics = step(member.learning_rate, state, params, batch)
        log.append(jax.device_get((metrics.loss, metrics.tokens, metrics.skipped)))
    return Trained(jax.device_get(state.adapter), *map(np.array, zip(*log, strict=True)))


def largest_difference(one, other):
    leaves = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in leaves)


class Decoding(NamedTuple):
    """The tiny decoder, real packed rows, and eight settings of rank, alpha and learning rate."""

    params: dict
    members: list
    batches: list
    loss_of: object


@pytest.fixture(scope="module")
def decoding():
    base, packed = pretrained.load("tiny"), tiny_task.tiny_task().packed

    def model_fn(params, batch):
        inputs = batch.tokens, batch.positions, batch.segment_ids
        return Decoder(base.config).apply({"params": params}, *inputs, logits_at=batch.predict_at)[
            0
        ]

    def loss_of(plan):
        adapted = lora.adapt(model_fn, plan)

        def loss_fn(adapter, params, batch):
            return cross_entropy(adapted(params, adapter, batch), batch.targets, batch.weights)

        return loss_fn

    task = tiny_task.Task(base.params, {}, None, packed, None)
    batches = tiny_task.batches(task, batch_size=2, accumulate=None)[:UPDATES]

    def member(seed, plan, rate):
        return Member(plan, init(jax.random.key(seed), base.params, plan), rate)

    config = functools.partial(lora.LoraConfig, targets=r".*(q|down)_proj/kernel")
    plans = [
        lora.plan(model_fn, base.params, batches[0], config=config(rank=rank, alpha=alpha))
        for rank, alpha in ((2, 3.0), (5, 8.0))
    ]
    grid = itertools.product(plans, (5e-4, 1e-3, 2e-3, 3e-3))
    members = [member(seed, *setting) for seed, setting in enumerate(grid)]
    return Decoding(jax.device_put(base.params), members, batches, loss_of)


def cosine(peak):
    share = schedule("cosine", 1.0, UPDATES, 2)
    return adamw(lambda count: peak * share(count), clip_norm=0.5)


def test_eight_adapters_trained_at_once_equal_eight_runs(decoding):
    loss_of, params, members, batches = (
        decoding.loss_of, decoding.params, decoding.members, decoding.batches
    )  # fmt: skip
    together = train_many(loss_of, cosine, params, members, batches)
    separate = [alone(loss_of, cosine, params, member, batches) for member in members]
    for one, other in zip(together, separate, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, atol=5e-6, rtol=0)
        assert largest_difference(one.adapter, other.adapter) < 1e-5
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert not one.skipped.any()
    assert len({each.losses[0].round(4) for each in together}) == 1
    pairs = itertools.combinations(together, 2)
    assert all(np.abs(one.losses - other.losses).max() > 1e-3 for one, other in pairs)


# A function with a stack, a plain weight, a vector and an embedding.


def small_model(params, tokens):
    hidden = params["embedding"][tokens] * params["gain"]
    hidden = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, params["layers"])[0]
    return hidden @ params["head"]


SHAPES = {"embedding": (11, 6), "gain": (6,), "layers": (3, 6, 6), "head": (6, 11)}
KEYS = dict(zip(SHAPES, jax.random.split(jax.random.key(0), len(SHAPES)), strict=True))
SMALL = {name: 0.5 * jax.random.normal(KEYS[name], shape) for name, shape in SHAPES.items()}
TOKENS = [
    jax.random.randint(jax.random.fold_in(KEYS["head"], k), (2, 9), 0, 11) for k in range(UPDATES)
]


def small_loss_of(plan):
    adapted = lora.adapt(small_model, plan)

    def loss_fn(adapter, params, tokens):
        logits = adapted(params, adapter, tokens[:, :-1]).reshape(-1, 11)
        return cross_entropy(logits, tokens[:, 1:].reshape(-1), jnp.ones(tokens[:, 1:].size))

    return loss_fn


def small_member(config, seed=0, learning_rate=0.02):
    plan = lora.plan(small_model, SMALL, TOKENS[0][:, :-1], config=config)
    return Member(plan, init(jax.random.key(seed), SMALL, plan), learning_rate)


TARGETS = (
    "layers",
    lora.Rule("head", variant="dora"),
    lora.Rule("gain", variant="full"),
    lora.Rule("embedding", variant="rows", rows=(2, 5)),
)


@functools.cache
def mixed_members():
    Config = functools.partial(lora.LoraConfig, targets=TARGETS)
    return [
        small_member(Config(rank=1, alpha=1.0)),
        small_member(Config(rank=4, alpha=3.0, use_rslora=True, init="gaussian"), 1, 0.05),
    ]


@functools.cache
def stacked_members():
    return [
        small_member(lora.LoraConfig(rank=(2, 0, 3), alpha=(1.0, 2.0, 7.0), targets="layers")),
        small_member(lora.LoraConfig(rank=5, alpha=10.0, targets="layers"), seed=1),
    ]


@functools.cache
def bias_members():
    targets = ("layers", lora.Rule("gain", variant="bias"))
    configs = [lora.LoraConfig(rank=2, alpha=a, targets=targets) for a in (1.0, 6.0)]
    return [small_member(config) for config in configs]


def optimizer(learning_rate):
    return adamw(learning_rate, clip_norm=0.3, weight_decay=0.1, b_ratio=2.0)


@pytest.mark.parametrize("make", [mixed_members, stacked_members, bias_members])
def test_every_variant_scale_and_rank_along_a_stack(make):
    members = make()
    together = train_many(small_loss_of, optimizer, SMALL, members, TOKENS)
    for one, member in zip(together, members, strict=True):
        other = alone(small_loss_of, optimizer, SMALL, member, TOKENS)
        assert jax.tree.map(np.shape, one.adapter) == jax.tree.map(np.shape, member.adapter)
        np.testing.assert_allclose(one.losses, other.losses, atol=2e-6, rtol=0)
        assert largest_difference(one.adapter, other.adapter) < 1e-5
        assert largest_difference(one.adapter, member.adapter) > 1e-2


def test_without_the_members_scales_the_runs_differ():
    members = stacked_members()
    joint = join(members)
    ones = {path: np.ones_like(scales) for path, scales in joint.traits.scales.items()}
    step = many_step(small_loss_of(joint.plan), optimizer)
    ends = []
    for scales in (joint.traits.scales, ones):
        state = init_many(joint, optimizer)
        for tokens in TOKENS:
            state, _ = step(state, joint.traits._replace(scales=scales), SMALL, tokens)
        ends.append(jax.device_get(state.adapter))
    assert largest_difference(*ends) > 1e-2


def test_what_fills_up_a_rank_stays_zero_and_counts_in_no_norm():
    members = stacked_members()
    joint = join(members)
    state = init_many(joint, optimizer)
    step = many_step(small_loss_of(joint.plan), optimizer)
    for tokens in TOKENS:
        state, metrics = step(state, joint.traits, SMALL, tokens)
    moments = state.opt_state[1]
    for entry in (each["layers"] for each in (state.adapter, moments.mu, moments.nu)):
        for number, ranks in enumerate([(2, 0, 3), (5, 5, 5)]):
            for layer, rank in enumerate(ranks):
                a, b = entry.a[number, layer], entry.b[number, layer]
                assert not np.any(a[:, rank:])
                assert not np.any(b[rank:])
                assert np.all(a[:, :rank])
                assert np.all(b[:rank])
    for norm, member in zip(metrics.grad_norm, members, strict=True):
        own = last_norm(member)
        assert abs(float(norm) - own) < 1e-5 * own


def last_norm(member):
    state = init_state(member.adapter, optimizer(member.learning_rate))
    step = compiled(small_loss_of, optimizer, member.plan)
    for tokens in TOKENS:
        state, metrics = step(member.learning_rate, state, SMALL, tokens)
    return float(metrics.grad_norm)


def test_the_loss_of_many_is_that_of_each():
    members = stacked_members()
    trained = train_many(small_loss_of, optimizer, SMALL, members, TOKENS)
    ended = [m._replace(adapter=t.adapter) for m, t in zip(members, trained, strict=True)]
    heldout = TOKENS[3:5]
    together = evaluate_many(small_loss_of, SMALL, ended, heldout)
    stacked = [jnp.stack(heldout)]
    accumulated = evaluate_many(small_loss_of, SMALL, ended, stacked, accumulate=True)
    np.testing.assert_allclose(accumulated, together, rtol=1e-6)
    for loss, member in zip(together, ended, strict=True):
        before = [alone(small_loss_of, optimizer, SMALL, member, [each]) for each in heldout]
        assert abs(loss - np.mean([each.losses[0] for each in before])) < 1e-6
    assert np.ptp(together) > 1e-2


def test_each_member_has_its_own_dropout():
    members = [
        small_member(lora.LoraConfig(rank=2, targets="layers", dropout=0.5), seed)
        for seed in (0, 1)
    ]

    def loss_of(plan):
        adapted = lora.adapt(small_model, plan)

        def loss_fn(adapter, params, batch):
            tokens, key = batch
            logits = adapted(params, adapter, tokens, dropout_key=jax.random.wrap_key_data(key))
            return LossSum((logits**2).sum(), jnp.float32(tokens.size))

        return loss_fn

    keys = np.array([[[seed, update] for seed in (7, 8)] for update in range(UPDATES)], np.uint32)
    batches = list(zip(TOKENS, keys, strict=True))
    together = train_many(loss_of, optimizer, SMALL, members, batches, batch_axes=(None, 0))
    for number, member in enumerate(members):
        own, others = ([(t, k[n]) for t, k in batches] for n in (number, 1 - number))
        expected = alone(loss_of, optimizer, SMALL, member, own)
        np.testing.assert_allclose(together[number].losses, expected.losses, rtol=1e-5)
        swapped = alone(loss_of, optimizer, SMALL, member, others)
        assert np.abs(together[number].losses / swapped.losses - 1).max() > 1e-2


def test_one_that_diverges_is_left_as_it_was_and_the_others_do_not_notice():
    calm = small_member(lora.LoraConfig(2, targets="head"), learning_rate=0.1)
    members = [calm, calm._replace(learning_rate=1e30)]
    calm, lost = train_many(small_loss_of, optax.sgd, SMALL, members, TOKENS)
    expected = alone(small_loss_of, optax.sgd, SMALL, members[0], TOKENS)
    np.testing.assert_allclose(calm.losses, expected.losses, atol=1e-6, rtol=0)
    assert not calm.skipped.any()
    assert lost.skipped.tolist() == [False] + [True] * (UPDATES - 1)
    assert (lost.losses[1:] > 1e20).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lost.adapter))


def test_each_member_has_its_own_loss_scale():
    policy = PRECISIONS["float16"]
    members = stacked_members()
    together = train_many(small_loss_of, optimizer, SMALL, members, TOKENS, policy=policy)
    for one, member in zip(together, members, strict=True):
        other = alone(small_loss_of, optimizer, SMALL, member, TOKENS, policy)
        np.testing.assert_allclose(one.losses, other.losses, atol=2e-6, rtol=0)


def test_metrics_come_once_an_update_and_training_stops_when_asked():
    seen = []
    members = stacked_members()

    def observe(update, metrics):
        seen.append((update, metrics.loss.shape))

    trained = train_many(
        small_loss_of,
        optimizer,
        SMALL,
        members,
        TOKENS,
        observe=observe,
        should_stop=lambda: len(seen) == 3,
    )
    assert seen == [(update, (2,)) for update in range(1, 5)]
    assert [len(each.losses) for each in trained] == [4, 4]
    [nothing] = train_many(small_loss_of, optimizer, SMALL, members[:1], [])
    assert nothing.losses.shape == (0,)
    assert largest_difference(nothing.adapter, members[0].adapter) == 0


# The base, in the compiled step.

WIDTH, LAYERS, ROWS, MEMBERS = 512, 4, 3, 8


def wide_model(params, x):
    for weight in params.values():
        x = jnp.tanh(x @ weight)
    return x


def wide_loss_of(plan):
    adapted = lora.adapt(wide_model, plan)

    def loss_fn(adapter, params, x):
        return LossSum((adapted(params, adapter, x) ** 2).sum(), jnp.float32(ROWS))

    return loss_fn


def wide_member(seed):
    params = {f"w{k}": jnp.full((WIDTH, WIDTH), 0.01) for k in range(LAYERS)}
    config = lora.LoraConfig(rank=2, targets=".*")
    plan = lora.plan(wide_model, params, jnp.ones((ROWS, WIDTH)), config=config)
    return params, Member(plan, lora.init(jax.random.key(seed), params, plan), 0.01)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def products_with_the_base(lowered):
    return len(re.findall(rf"dot_general.*tensor<{WIDTH}x{WIDTH}xf32>", lowered.as_text()))


def test_the_base_is_held_once_and_multiplied_once():
    members = [wide_member(seed)[1] for seed in range(MEMBERS)]
    params, x = wide_member(0)[0], jnp.ones((ROWS, WIDTH))
    joint = join(members)
    state = init_many(joint, adamw)
    loss_fn = wide_loss_of(joint.plan)
    lowered = many_step(loss_fn, adamw).lower(state, joint.traits, params, x)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    needed = bytes_of((state, joint.traits, params, x))
    assert needed - 64 <= memory.argument_size_in_bytes <= needed
    assert memory.temp_size_in_bytes < bytes_of(params)
    assert f"[{MEMBERS},{WIDTH},{WIDTH}]" not in compiled.as_text()

    tx = adamw(0.01)
    own = jax.jit(make_step(wide_loss_of(members[0].plan), tx))
    own = own.lower(init_state(members[0].adapter, tx), params, x)
    # Forward in each layer, and backward in each but the first, whose input doesn't train.
    assert products_with_the_base(own) == products_with_the_base(lowered) == 2 * LAYERS - 1

    def with_a_base_each(state, params):
        return jax.vmap(make_step(loss_fn, tx), in_axes=(0, 0, None))(state, params, x)

    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * MEMBERS), params)
    mapped = jax.jit(with_a_base_each).lower(state, copies).compile()
    assert f"[{MEMBERS},{WIDTH},{WIDTH}]" in mapped.as_text()
    assert mapped.memory_analysis().argument_size_in_bytes > MEMBERS * bytes_of(params)


def test_the_step_is_traced_once():
    traced = []

    def counting(plan):
        loss_fn = small_loss_of(plan)

        def counted(*args):
            traced.append(args)
            return loss_fn(*args)

        return counted

    train_many(counting, optimizer, SMALL, stacked_members()[:1], TOKENS)
    assert len(traced) == 1


# What can't be trained together.


def test_no_members():
    with pytest.raises(lora.InputError, match="no members"):
        train_many(small_loss_of, optimizer, SMALL, [], TOKENS)


def test_every_way_in_which_members_do_not_fit_is_named():
    first = small_member(lora.LoraConfig(2, targets="layers"))
    other = small_member(lora.LoraConfig(2, targets=("layers", "head"), dropout=0.1))
    of_another_rank = first._replace(adapter=small_member(lora.LoraConfig(4, targets="layers"))[1])
    with pytest.raises(lora.InputError) as error:
        train_many(small_loss_of, optimizer, SMALL, [first, other, of_another_rank], TOKENS)
    message = str(error.value)
    assert "member 1: 'head' is adapted here alone" in message
    assert "'dropout': 0.1" in message
    assert "'dropout': 0.0" in message
    assert "member 2: the adapter has {'a': (3, 6, 4), 'b': (3, 4, 6)} at 'layers'" in message
