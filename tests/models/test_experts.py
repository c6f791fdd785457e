"""The mixture of experts against transformers' blocks and MiniMind's maths, and its invariances."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import lora_jax as lora
from lora_jax.errors import InputError
from lora_jax.models.experts import ExpertsForm, RoutedMLP, Routing, sequence_loss, switch_loss
from lora_jax.models.presets import TINY

HIDDEN, BATCH, TIME = 16, 2, 10
FORM = ExpertsForm(count=5, per_token=2, width=12)
PRODUCTS = ("scan", "ragged")
products = pytest.mark.parametrize("products", PRODUCTS)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


X = random(BATCH, TIME, HIDDEN)
PULL = random(BATCH, TIME, HIDDEN, seed=1)


def params_of(form):
    shapes = jax.eval_shape(RoutedMLP(form).init, jax.random.key(0), X)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [random(*x.shape, seed=n) * x.shape[-2] ** -0.5 for n, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


@partial(jax.jit, static_argnums=(0, 3))
def run(form, params, x, products="scan"):
    """The block, its routing, and the gradients of <block, PULL> + both balance losses."""

    block = RoutedMLP(form, products=products)

    def pulled(params, x):
        y, sown = block.apply({"params": params}, x, mutable=["routing"])
        routing = sown["routing"]["router"]
        losses = switch_loss(routing), sequence_loss(routing)
        return jnp.sum(y * PULL) + sum(losses), (y, routing, losses)

    grads, aux = jax.grad(pulled, argnums=(0, 1), has_aux=True)(params, x)
    return *aux, grads


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def torch_losses(probabilities, chosen, experts):
    """Both balance losses, from their formulas."""
    sent = F.one_hot(chosen, experts).float()
    share = sent.flatten(0, -3).mean(0).sum(0)
    switch = experts * (share * probabilities.flatten(0, -2).mean(0)).sum()
    counts = torch.stack([torch.bincount(row.flatten(), minlength=experts) for row in chosen])
    load = counts / (chosen.shape[1] * chosen.shape[2] / experts)
    return switch, (load * probabilities.mean(dim=1)).sum(dim=1).mean()


def transformers_block(form):
    common = {"hidden_size": HIDDEN, "num_experts_per_tok": form.per_token}
    if form.renormalised:
        sizes = {"num_local_experts": form.count, "intermediate_size": form.width}
        return MixtralSparseMoeBlock(MixtralConfig(**common, **sizes))
    sizes = {"num_experts": form.count, "moe_intermediate_size": form.width}
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**common, **sizes))


@products
@pytest.mark.parametrize("renormalised", [True, False], ids=["mixtral", "qwen3_moe"])
def test_the_block_of_transformers(products, renormalised):
    form = replace(FORM, renormalised=renormalised)
    params = params_of(form)
    block = transformers_block(form)
    block.load_state_dict(
        {
            "gate.weight": torch.tensor(params["gate"]["kernel"].T),
            "experts.gate_up_proj": torch.tensor(params["experts"]["gate_up_proj"]).mT,
            "experts.down_proj": torch.tensor(params["experts"]["down_proj"]).mT,
        }
    )
    x = torch.tensor(X, requires_grad=True)
    y = block(x)
    logits, _, chosen = block.gate(x.reshape(-1, HIDDEN))
    chosen = chosen.reshape(BATCH, TIME, -1)
    losses = torch_losses(logits.softmax(-1).reshape(BATCH, TIME, -1), chosen, form.count)
    ((y * torch.tensor(PULL)).sum() + sum(losses)).backward()
    ours, routing, our_losses, (grads, x_grad) = run(form, params, X, products)
    close(ours, y.detach())
    np.testing.assert_array_equal(routing.chosen, chosen)
    close(our_losses, [loss.item() for loss in losses])
    close(x_grad, x.grad, 5e-5)
    close(grads["gate"]["kernel"].T, block.gate.weight.grad, 5e-5)
    close(grads["experts"]["gate_up_proj"].mT, block.experts.gate_up_proj.grad, 5e-5)
    close(grads["experts"]["down_proj"].mT, block.experts.down_proj.grad, 5e-5)
    other = RoutedMLP(replace(form, renormalised=not renormalised)).apply({"params": params}, X)
    assert np.abs(other - ours).max() > 1e-2


def minimind(params, x, form):
    """MiniMind's first mixture: renormalised with 1e-20, and an expert that all tokens meet."""

    def feed_forward(gate, up, down, x):
        return (F.silu(x @ gate) * (x @ up)) @ down

    weight = {path: torch.tensor(leaf) for path, leaf in params["experts"].items()}
    flat = x.reshape(-1, HIDDEN)
    probabilities = (flat @ torch.tensor(params["gate"]["kernel"])).softmax(-1)
    top, chosen = probabilities.topk(form.per_token, sorted=False)
    top = top / (top.sum(-1, keepdim=True) + 1e-20)
    rows = []
    for token, weights, experts in zip(flat, top, chosen, strict=True):
        parts = [
            w * feed_forward(*weight["gate_up_proj"][e].chunk(2, 1), weight["down_proj"][e], token)
            for w, e in zip(weights, experts, strict=True)
        ]
        rows.append(sum(parts))
    shared = (params["shared_expert"][f"{n}_proj"]["kernel"] for n in ("gate", "up", "down"))
    y = torch.stack(rows) + feed_forward(*map(torch.tensor, shared), flat)
    shape = (*x.shape[:2], -1)
    return y.reshape(x.shape), probabilities.reshape(shape), chosen.reshape(shape)


def test_the_mathematics_of_minimind():
    form = ExpertsForm(count=4, per_token=2, width=12, renormalised=True, shared_width=20)
    params = params_of(form)
    x = torch.tensor(X, requires_grad=True)
    y, probabilities, chosen = minimind(params, x, form)
    losses = torch_losses(probabilities, chosen, form.count)
    ((y * torch.tensor(PULL)).sum() + sum(losses)).backward()
    ours, _, our_losses, (_, x_grad) = run(form, params, X)
    close(ours, y.detach())
    close(our_losses, [loss.item() for loss in losses])
    close(x_grad, x.grad, 5e-5)
    without = RoutedMLP(replace(form, shared_width=0)).apply({"params": params}, X)
    assert np.abs(without - ours).max() > 1e-2


def test_balance_of_all_layers_is_that_of_transformers():
    layers, count = 3, 4
    logits = torch.tensor(random(layers, BATCH * TIME, count))
    mask = torch.ones(BATCH, TIME)
    mask[0, 6:] = 0
    probabilities = logits.softmax(-1).reshape(layers, BATCH, TIME, count)
    chosen = probabilities.topk(2).indices
    routing = Routing(jnp.asarray(probabilities), jnp.asarray(chosen))
    theirs = partial(load_balancing_loss_func, tuple(logits), count, top_k=2)
    close(switch_loss(routing), theirs())
    close(switch_loss(routing, mask.numpy()), theirs(attention_mask=mask))
    assert abs(theirs() - theirs(attention_mask=mask)) > 1e-3
    by_layer = sum(
        torch_losses(*layer, count)[0] for layer in zip(probabilities, chosen, strict=True)
    )
    close(jax.vmap(switch_loss)(routing).sum(), by_layer)
    rows = sum(torch_losses(*layer, count)[1] for layer in zip(probabilities, chosen, strict=True))
    close(sequence_loss(routing), rows)


def test_both_ways_of_computing_agree_where_experts_get_nothing():
    form = replace(FORM, per_token=1)
    params = params_of(form)
    params["gate"]["kernel"][:, 1:] = 0.0
    x = np.abs(X)
    params["gate"]["kernel"][:, 0] = 1.0  # every token goes to the first expert
    one, other = (run(form, params, x, products) for products in PRODUCTS)
    assert not one[1].chosen.any()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        close(a, b, 5e-5)
    assert not np.any(one[3][0]["experts"]["down_proj"][1:])


def test_what_an_expert_would_make_of_others_tokens_does_not_matter():
    params = params_of(FORM)
    expected = run(FORM, params, X)
    assert not np.isnan(expected[0]).any()
    never = int(np.argmin(np.bincount(expected[1].chosen[0].ravel(), minlength=5)))
    params["experts"]["gate_up_proj"][never] *= 1e30  # what it makes of a token is infinite
    with_huge = run(FORM, params, X)
    meets = (expected[1].chosen == never).any(axis=-1)
    assert np.isnan(with_huge[0][meets]).any() or np.isinf(with_huge[0][meets]).any()
    np.testing.assert_array_equal(with_huge[0][~meets], expected[0][~meets])
    np.testing.assert_array_equal(with_huge[3][1][~meets], expected[3][1][~meets])


def layered(form, products, params, x):
    """Two blocks in a scan, as a decoder has them."""

    def add(x, params):
        return x + RoutedMLP(form, products=products).apply({"params": params}, x), None

    return jax.lax.scan(add, x, params)[0]


def planned(form, products="scan"):
    params = jax.tree.map(lambda leaf: np.stack([leaf, 1.1 * leaf]), params_of(form))
    function = partial(layered, form, products)
    config = lora.LoraConfig(rank=2, alpha=4, targets=".*")
    plan = lora.plan(function, params, X, config=config, strict=True)
    adapter = lora.init(jax.random.key(0), params, plan)
    random_too = jax.tree.map(lambda leaf: leaf + 0.2 * random(*leaf.shape), adapter)
    return function, params, plan, random_too


@products
def test_an_adapter_has_an_a_and_a_b_for_each_expert(products):
    function, params, plan, adapter = planned(replace(FORM, shared_width=8), products)
    roles = {path: site.roles for path, site in plan.items()}
    assert roles.pop("experts/gate_up_proj") == ("stack", "stack", "in", "out")
    assert roles.pop("experts/down_proj") == ("stack", "stack", "in", "out")
    assert set(roles.values()) == {("stack", "in", "out")}
    assert len(roles) == 4  # the router and the shared expert
    assert adapter["experts/down_proj"].a.shape == (2, 5, 12, 2)
    assert not any(use.merged_because for site in plan.values() for use in site.uses)
    plain = jax.jit(function)
    adapted = jax.jit(lora.adapt(function, plan))(params, adapter, X)
    close(adapted, plain(lora.merge(params, adapter, plan), X), 5e-5)
    assert np.abs(adapted - plain(params, X)).max() > 1e-2


def test_many_adapters_over_one_base():
    function, params, plan, adapter = planned(FORM)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), adapter)
    adapted = lora.adapt(function, plan)

    def loss(adapter):
        return jnp.sum(adapted(params, adapter, X) ** 2)

    together = jax.jit(jax.vmap(jax.value_and_grad(loss)))(several)
    alone = jax.jit(jax.value_and_grad(loss))
    for n in range(2):
        expected = alone(jax.tree.map(lambda leaf, n=n: leaf[n], several))
        ours = jax.tree.map(lambda leaf, n=n: leaf[n], together)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            close(a / np.abs(b).max(), b / np.abs(b).max())


@products
def test_compute_in_bfloat16(products):
    params = params_of(FORM)
    x = jnp.asarray(X, jnp.bfloat16)
    block = RoutedMLP(FORM, dtype="bfloat16", products=products)
    y, sown = block.apply({"params": params}, x, mutable=["routing"])
    assert y.dtype == jnp.bfloat16
    assert sown["routing"]["router"].probabilities.dtype == jnp.float32
    exact = RoutedMLP(FORM).apply({"params": params}, x.astype("f4"))
    close(y.astype("f4"), exact, 0.1)


IMPOSSIBLE = {
    "count": (0, "experts.count=0 is below 1"),
    "per_token": (6, "experts.per_token=6 is more than experts.count=5"),
    "width": (0, "experts.width=0 is below 1"),
    "shared_width": (-1, "experts.shared_width=-1 is negative"),
}


@pytest.mark.parametrize(("field", "fault"), IMPOSSIBLE.items(), ids=IMPOSSIBLE.keys())
def test_impossible_forms_are_named(field, fault):
    with pytest.raises(InputError, match=fault[1]):
        replace(TINY, experts=replace(FORM, **{field: fault[0]}))


def test_an_unknown_way_of_computing_is_named():
    with pytest.raises(
        InputError, match="decoder: expert_products='dense' is none of scan, ragged"
    ):
        replace(TINY, expert_products="dense")
