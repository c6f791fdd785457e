"""Any torch module beside any JAX function: what agrees, and what is said where it doesn't."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch_lora_models import (
    MLP,
    MODELS,
    VOCAB,
    adapted,
    as_jax,
    build,
    data,
    jax_transformer,
    linear,
)

import lora_jax as lora
from interop import pretrained
from interop.decoder_sides import decoder_function, torch_logits
from interop.decoder_training import Start, peft_model
from interop.keymaps import LLAMA, Keymap, Rule
from interop.module_comparison import compare
from interop.testing import assert_equivalent, load_adapter
from interop.torch_lora import apply_lora, by_name, lora_layers

TOKENS = data()[0][0]
MLP_KEYS = Keymap(
    (
        Rule("embed.weight", "embed.weight", (), "embedding"),
        Rule("up.weight", "up.weight", (1, 0), "linear"),
        Rule("down.weight", "down.weight", (1, 0), "linear"),
    )
)
BLOCK_KEYS = Keymap(
    tuple(
        Rule(f"layers.{{i}}.{part}.weight", f"layers.{{i}}.{part}.weight", (1, 0), "linear")
        for part in ("q", "v", "o", "down")
    )
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mlp_with_layers(params, tokens):
    embed = params["embed.weight"][tokens]
    up = linear(params, "up", embed)
    down = linear(params, "down", jax.nn.gelu(up, approximate=False))
    return down, {"embed": embed, "up": up, "down": down}


CASES = {
    "mlp": (mlp_with_layers, MLP_KEYS, ["embed", "up", "down"]),
    "transformer": (jax_transformer, BLOCK_KEYS, []),
}


def sides(name, jax_fn=None):
    """The arguments of `assert_equivalent`: a torch module with an adapter, and all of ours."""
    make, _, select, pattern = MODELS[name]
    default, keymap, _ = CASES[name]
    jax_fn = jax_fn or default
    module, _ = adapted(make, select)
    params, adapter = as_jax(module)
    config = lora.LoraConfig(rank=4, alpha=6, targets=pattern)
    plan = lora.plan(jax_fn, params, TOKENS, config=config)
    given = {"adapter": adapter, "plan": plan, "keymap": keymap}
    return (module, jax_fn, params, TOKENS), given


def in_peft(name, given, params, **settings):
    """A PEFT model of the same base, with our adapter copied in."""
    make, _, _, _ = MODELS[name]
    modules = [path.removesuffix(".weight") for path in given["plan"]]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, **settings)
    model = peft.get_peft_model(build(make), config)
    load_adapter(model, given["adapter"], given["plan"], params, given["keymap"])
    return model


@pytest.mark.parametrize(
    ("name", "framework"),
    [
        ("mlp", "torch_lora"),
        ("mlp", "peft"),
        ("transformer", "torch_lora"),
        ("transformer", "peft"),
    ],
)
def test_one_function_passes_with_layers_output_and_gradients(name, framework):
    (module, *ours), given = sides(name)
    if framework == "peft":
        module = in_peft(name, given, ours[1])
    module.train()
    found = assert_equivalent(module, *ours, **given)
    assert [layer.name for layer in found.layers] == CASES[name][2]
    assert len(found.gradients) == 2 * len(given["plan"])
    assert found.effect > 0.05
    assert max(each.relative for each in found.gradients) < 1e-5
    assert module.training
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_gradients_are_left_as_they_were(fails):
    (module, jax_fn, *ours), given = sides("mlp")
    module.train()
    module.up.eval()
    modes = [each.training for each in module.modules()]
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 2.0) if parameter.requires_grad else None
    before = [parameter.grad for parameter in module.parameters()]

    def call(module, *inputs):
        assert not any(each.training for each in module.modules())
        output = module(*inputs)
        return output[:1] if fails else output

    arguments = (jax_fn, ours[0], (TOKENS,))
    if fails:
        with pytest.raises(lora.InputError, match="the output is"):
            compare(module, *arguments, **given, call=call)
    else:
        found = compare(module, *arguments, **given, call=call)
        assert max(each.relative for each in found.gradients) < 1e-5
    assert [each.training for each in module.modules()] == modes
    for parameter, gradient in zip(module.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or (gradient == 2).all()


def test_an_embedding_and_unequal_layers_are_compared_as_peft_has_them():
    module = build(MLP)
    params, _ = as_jax(module)
    targets = lora.Rule(r"up\.weight", rank=2), r"embed\.weight"
    config = lora.LoraConfig(rank=4, alpha=6, targets=targets)
    plan = lora.plan(mlp_with_layers, params, TOKENS, config=config)
    adapter = lora.init(jax.random.key(0), params, plan)
    key = jax.random.key(1)
    adapter = {p: e._replace(b=jax.random.normal(key, e.b.shape)) for p, e in adapter.items()}
    ranks = {"rank_pattern": {"up": 2}, "alpha_pattern": {"up": 6}}
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed", "up"], **ranks)
    model = peft.get_peft_model(module, settings)
    load_adapter(model, adapter, plan, params, MLP_KEYS)
    given = {"adapter": adapter, "plan": plan, "keymap": MLP_KEYS}
    found = assert_equivalent(model, mlp_with_layers, params, TOKENS, **given)
    shapes = {each.name.removeprefix("base_model.model."): each.shape for each in found.gradients}
    assert shapes["embed.lora_embedding_A"] == (4, VOCAB)
    assert shapes["up.lora_A.weight"] == (2, 16)


def test_without_an_adapter_only_the_function_is_compared():
    module = build(MLP)
    found = assert_equivalent(module, mlp_with_layers, as_jax(module)[0], TOKENS)
    assert found.gradients == ()
    assert found.effect is None
    with pytest.raises(lora.InputError, match="adapter, plan and keymap together"):
        compare(module, mlp_with_layers, {}, (TOKENS,), keymap=MLP_KEYS)


def stopped(params, tokens):
    """The same values; nothing before ``down`` gets a gradient."""
    embed = params["embed.weight"][tokens]
    up = jax.lax.stop_gradient(linear(params, "up", embed))
    return linear(params, "down", jax.nn.gelu(up, approximate=False))


def change_weight(module, given):
    module.up.original_layer.weight.data[3, 4] += 0.01


def change_scale(module, given):
    module.down.scaling *= 1.001


def negate_b(module, given):
    module.up.lora_B.data *= -1


def not_a_number(module, given):
    module.down.original_layer.bias.data[0] = torch.nan


DAMAGED = {
    "a weight": (change_weight, "up"),
    "the scale": (change_scale, "down"),
    "a factor": (negate_b, "up"),
    "not a number": (not_a_number, "down"),
}


@pytest.mark.parametrize(("damage", "first"), DAMAGED.values(), ids=DAMAGED)
def test_the_first_layer_that_disagrees_is_marked(damage, first):
    (module, *ours), given = sides("mlp")
    damage(module, given)
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(module, *ours, **given)
    message = str(caught.value)
    assert f"differ: {first} is the first of" in message
    (marked,) = [line for line in message.splitlines() if "◀" in line and "lora_" not in line]
    assert marked.split()[0] == first
    (agrees,) = [line for line in message.splitlines() if line.split()[:1] == ["embed"]]
    assert "disagrees" not in agrees


def test_a_gradient_that_differs_where_all_values_agree_is_found():
    arguments, given = sides("mlp", stopped)
    with pytest.raises(AssertionError, match=r"up\.lora_A\.weight is the first of 2 that do"):
        assert_equivalent(*arguments, **given)
    found = compare(*arguments[:3], (TOKENS,), **given)
    assert found.output.within(1e-5)
    apart = {each.name for each in found.gradients if not each.within(1e-4)}
    assert {name.removeprefix("base_model.model.") for name in apart} == {
        "up.lora_A.weight",
        "up.lora_B.weight",
    }


def test_an_adapter_that_does_nothing_fails():
    (module, *ours), given = sides("mlp")
    for layer in lora_layers(module).values():
        nn.init.zeros_(layer.lora_B)
    idle = {path: pair._replace(b=0 * pair.b) for path, pair in given["adapter"].items()}
    with pytest.raises(AssertionError, match=r"moves the output by 0\.0e\+00.*fill B"):
        assert_equivalent(module, *ours, **given | {"adapter": idle})
    found = assert_equivalent(module, *ours, **given | {"adapter": idle}, min_effect=0)
    assert found.effect == 0


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x):
        return self.same(self.same(x))


def with_layers(**layers):
    return lambda params, x: (x, {name: layer(x) for name, layer in layers.items()})


X = np.ones((2, 3), np.float32)
REFUSED = {
    r"no simy \(nearest: .*same": (Twice(), with_layers(simy=jnp.sin)),
    "torch calls same more than once": (Twice(), with_layers(same=jnp.sin)),
    r"0 is \(2,\) in JAX and \(2, 3\) in torch": (
        nn.Sequential(nn.Identity()),
        with_layers(**{"0": lambda x: x[:, 0]}),
    ),
    r"output is \(2, 3\) in JAX and \(2, 1\) in torch": (
        nn.Sequential(nn.Linear(3, 1)),
        lambda params, x: x,
    ),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_compared_is_named(message, case):
    module, jax_fn = case
    with pytest.raises(lora.InputError, match=message):
        compare(module, jax_fn, {}, (X,))


def test_a_module_that_is_never_called_is_named():
    module = Twice()
    module.spare = nn.Identity()
    with pytest.raises(lora.InputError, match="torch never calls spare"):
        compare(module, with_layers(spare=jnp.sin), {}, (X,))


KEYMAP_FAULTS = {
    "kind": (
        Keymap(tuple(rule._replace(kind="other") for rule in MLP_KEYS.rules)),
        r"rule of 'up\.weight' has kind 'other'.*rule of 'down\.weight'|"
        r"rule of 'down\.weight' has kind 'other'.*rule of 'up\.weight'",
    ),
    "rule": (Keymap(MLP_KEYS.rules[:2]), r"no rule for 'down\.weight'"),
    "module": (
        MLP_KEYS._replace(rules=(*MLP_KEYS.rules[:2], MLP_KEYS.rules[2]._replace(name="d.weight"))),
        r"\.d\.lora_A\.weight is \(4, 32\) in JAX and absent .*\.down\.lora_A\.weight is absent",
    ),
}


@pytest.mark.parametrize(("keymap", "message"), KEYMAP_FAULTS.values(), ids=KEYMAP_FAULTS)
def test_a_keymap_that_does_not_fit_is_named(keymap, message):
    arguments, given = sides("mlp")
    with pytest.raises(lora.InputError, match=message):
        assert_equivalent(*arguments, **given | {"keymap": keymap})


def test_a_torch_module_that_trains_nothing_is_refused():
    (module, *ours), given = sides("mlp")
    module.requires_grad_(False)
    with pytest.raises(lora.InputError, match=r"requires a gradient.*is_trainable=True"):
        assert_equivalent(module, *ours, **given)


def test_an_adapter_of_another_rank_is_not_loaded():
    (_, _, params, _), given = sides("mlp")
    other = build(MLP)
    apply_lora(other, by_name("up", "down"), rank=3)
    before = other.up.lora_A.clone()
    with pytest.raises(lora.InputError, match=r"up\.lora_A\.weight is \(4, 16\) in JAX and \(3,"):
        load_adapter(other, given["adapter"], given["plan"], params, given["keymap"])
    assert torch.equal(other.up.lora_A, before)


def test_the_decoder_beside_transformers_and_peft():
    tiny = pretrained.load("tiny")
    config = lora.LoraConfig(
        rank=4, alpha=8, targets=(lora.Rule(".*k_proj/.*", rank=2, alpha=1.5), r".*_proj/kernel")
    )
    plan = lora.plan_from_axes(tiny.params, config, {"layers/.*": "stack in out"})
    fresh = lora.init(jax.random.key(0), tiny.params, plan)
    key = jax.random.key(1)
    adapter = {p: e._replace(b=0.2 * jax.random.normal(key, e.b.shape)) for p, e in fresh.items()}
    model = peft_model(Start(tiny.config, tiny.params, adapter, plan, LLAMA))
    tokens = np.random.default_rng(0).integers(0, 320, (2, 17))
    given = {"adapter": adapter, "plan": plan, "keymap": LLAMA, "call": torch_logits}
    found = assert_equivalent(model, decoder_function(tiny.config), tiny.params, tokens, **given)
    assert [layer.name for layer in found.layers] == ["model.layers.0", "model.layers.1"]
    assert len(found.gradients) == 2 * 2 * 7
