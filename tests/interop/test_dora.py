"""DoRA against torch and PEFT: forward, gradients, merge and dropout, for each kind of layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora
from lora_jax.rewrite.walk import Walk, trace
from lora_jax.rewrite.weight import symbolic_weight
from lora_jax.variants import factors_of

RNG = np.random.default_rng(0)
RANK, ALPHA = 3, 7.0


class Layer(NamedTuple):
    """The same layer in both frameworks; ``axes`` takes a torch weight to ours."""

    make_torch: Any
    apply: Any
    x: np.ndarray
    axes: tuple[int, ...]
    roles: tuple[str, ...]


def _layers():
    from torch import nn

    def conv(spatial, layout, kernel_layout):
        def apply(w, x):
            dims = (layout, kernel_layout, layout)
            return lax.conv_general_dilated(
                x, w, (2,) * spatial, [(1, 1)] * spatial, dimension_numbers=dims
            )

        return apply

    ids = np.array([[0, 5, 5], [8, 2, 1]])
    images = RNG.normal(size=(2, 4, 7, 6))
    return {
        "linear": Layer(
            lambda: nn.Linear(5, 6), lambda w, x: x @ w, RNG.normal(size=(4, 5)),
            (1, 0), ("in", "out"),
        ),
        "linear_stored_outputs_first": Layer(
            lambda: nn.Linear(5, 6), lambda w, x: x @ w.T, RNG.normal(size=(2, 4, 5)),
            (0, 1), ("out", "in"),
        ),
        "embedding": Layer(
            lambda: nn.Embedding(9, 6), lambda w, x: w[x], ids, (0, 1), ("in", "out"),
        ),
        "conv1d": Layer(
            lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), conv(1, "NCH", "OIH"),
            RNG.normal(size=(2, 4, 9)), (0, 1, 2), ("out", "in", "in"),
        ),
        "conv2d": Layer(
            lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), conv(2, "NCHW", "OIHW"),
            images, (0, 1, 2, 3), ("out", "in", "in", "in"),
        ),
        "conv2d_hwio": Layer(
            lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), conv(2, "NCHW", "HWIO"),
            images, (2, 3, 1, 0), ("in", "in", "in", "out"),
        ),
        "conv3d": Layer(
            lambda: nn.Conv3d(2, 6, 2, stride=2, padding=1), conv(3, "NCDHW", "OIDHW"),
            RNG.normal(size=(1, 2, 4, 5, 4)), (0, 1, 2, 3, 4), ("out", "in", "in", "in", "in"),
        ),
    }  # fmt: skip


LAYERS = _layers()


class Pair(NamedTuple):
    """A torch layer under PEFT and the adapted function, with the same values."""

    torch_model: Any
    model_fn: Any
    params: dict
    plan: lora.Plan
    adapter: dict
    x: np.ndarray


def _pair(layer: Layer, dropout: float = 0.0) -> Pair:
    import peft
    import torch

    torch.manual_seed(0)
    inner = torch.nn.Sequential(layer.make_torch()).double()
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["0"], lora_dropout=dropout
    )
    model = peft.get_peft_model(inner, config).double()
    torch.nn.init.normal_(_factor(model, "B"), std=0.3)
    torch.nn.init.normal_(_factor(model, "A"), std=0.3)
    magnitude = _magnitude(model)
    magnitude.data = magnitude.data * (1 + 0.2 * torch.randn_like(magnitude))
    target = model.base_model.model[0].base_layer
    w = target.weight.detach().numpy().transpose(layer.axes)
    bias = getattr(target, "bias", None)
    shape = (-1, *(1,) * (w.ndim - 2))
    b = 0.0 if bias is None else bias.detach().numpy().reshape(shape)
    params = {"w": jnp.asarray(w)}

    def model_fn(params, x):
        return layer.apply(params["w"], x) + b

    lora_config = lora.LoraConfig(RANK, ALPHA, "w", variant="dora", dropout=dropout)
    plan = lora.plan(model_fn, params, layer.x, config=lora_config)
    assert plan["w"].roles == layer.roles
    return Pair(model, model_fn, params, plan, {"w": _ours(model, plan["w"], layer)}, layer.x)


def _factor(model, name):
    layer = model.base_model.model[0]
    factors = getattr(layer, f"lora_embedding_{name}")
    return factors["default"] if "default" in factors else layer_weight(layer, name)


def layer_weight(layer, name):
    return getattr(layer, f"lora_{name}")["default"].weight


def _magnitude(model):
    return model.base_model.model[0].lora_magnitude_vector["default"].weight


def _ours(model, site, layer, attribute="data") -> lora.DoraTriple:
    """PEFT's factors, or their gradients, in the axes of ours."""
    a, b, m = (
        np.asarray(getattr(each, attribute).detach())
        for each in (_factor(model, "A"), _factor(model, "B"), _magnitude(model))
    )
    torch_inputs = [axis for axis in layer.axes if axis != layer.axes[layer.roles.index("out")]]
    a = a.T if len(layer.axes) == 2 else a.transpose(*torch_inputs, 0)
    return lora.DoraTriple(
        jnp.asarray(a.reshape(site.a_shape)),
        jnp.asarray(b.reshape(b.shape[0], -1).T.reshape(site.b_shape)),
        jnp.asarray(m.reshape(site.m_shape)),
    )


def _close(ours, theirs, tolerance=1e-9):
    difference = np.linalg.norm(np.asarray(ours) - np.asarray(theirs))
    assert difference <= tolerance * np.linalg.norm(np.asarray(theirs))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


@layers
@pytest.mark.parametrize("mode", ["low_rank", "merge"])
def test_forward_and_gradients_are_pefts(layer, mode):
    import torch

    pair = _pair(layer)
    theirs = pair.torch_model(torch.as_tensor(pair.x))
    torch.sin(theirs).sum().backward()
    adapted = lora.adapt(pair.model_fn, pair.plan, mode=mode)
    ours = adapted(pair.params, pair.adapter, pair.x)
    _close(ours, theirs.detach())
    base = pair.model_fn(pair.params, pair.x)
    assert np.linalg.norm(ours - base) > 0.1 * np.linalg.norm(base), "the adapter does something"

    grads = jax.grad(lambda a: jnp.sin(adapted(pair.params, a, pair.x)).sum())(pair.adapter)
    expected = _ours(pair.torch_model, pair.plan["w"], layer, "grad")
    for name, ours, theirs in zip(("a", "b", "m"), grads["w"], expected, strict=True):
        assert np.linalg.norm(theirs) > 0, name
        _close(ours, theirs)


@layers
def test_merged_weight_is_pefts(layer):
    pair = _pair(layer)
    merged = lora.merge(pair.params, pair.adapter, pair.plan)["w"]
    torch_merged = pair.torch_model.merge_and_unload()[0].weight.detach().numpy()
    _close(merged, torch_merged.transpose(layer.axes))
    assert np.linalg.norm(merged - pair.params["w"]) > 0.1


@layers
def test_fresh_magnitude_is_pefts(layer):
    import peft
    import torch

    inner = torch.nn.Sequential(layer.make_torch()).double()
    config = peft.LoraConfig(r=RANK, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(inner, config)
    weight = model.base_model.model[0].base_layer.weight.detach().numpy().transpose(layer.axes)
    plan = _pair(layer).plan
    fresh = lora.init(jax.random.key(0), {"w": jnp.asarray(weight)}, plan)["w"]
    _close(fresh.m, _magnitude(model).detach().numpy().reshape(fresh.m.shape))


@pytest.mark.parametrize("name", ["linear", "linear_stored_outputs_first", "conv2d"])
def test_dropout_acts_where_pefts_does(name):
    """The base product sees x, all that differs from it sees the dropped x."""
    import torch

    pair = _pair(LAYERS[name], dropout=0.4)
    key = jax.random.key(3)
    mask = _mask(pair, key)
    assert 0 < (mask == 0).mean() < 1
    peft_layer = pair.torch_model.base_model.model[0]
    peft_layer.lora_dropout["default"] = _FixedMask(torch.tensor(mask))
    pair.torch_model.train()
    theirs = pair.torch_model(torch.as_tensor(pair.x))
    adapted = lora.adapt(pair.model_fn, pair.plan)
    _close(adapted(pair.params, pair.adapter, pair.x, dropout_key=key), theirs.detach())
    without = adapted(pair.params, pair.adapter, pair.x)
    assert np.linalg.norm(without - theirs.detach().numpy()) > 0.1


def _mask(pair: Pair, key) -> np.ndarray:
    """The mask that the adapted function applies to x at its one use of the weight."""
    seen = []

    class Recording(Walk):
        def dropped(self, x, weight):
            kept = super().dropped(jnp.ones_like(x), weight)
            seen.append(np.asarray(kept))
            return super().dropped(x, weight)

    traced = trace(pair.model_fn, pair.params, (pair.x,), {})
    weight = symbolic_weight(
        pair.plan["w"],
        pair.params["w"],
        factors_of(pair.plan["w"], pair.params["w"], pair.adapter["w"]),
    )
    traced.run(Recording(dropout_key=key), {"w": weight})
    return seen[0]


def _FixedMask(mask):
    import torch

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * mask

    return Masked()
