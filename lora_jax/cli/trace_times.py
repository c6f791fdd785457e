"""One plain decoder with LoRA written by hand and with the rewrite, lowered in turns."""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import lora_jax as lora
from lora_jax.adapter import LoraPair
from lora_jax.adapting import Mode

HIDDEN, INTERMEDIATE, HEADS, RANK, SCALE = 64, 128, 4, 4, 2.0
KERNELS = {
    "q": (HIDDEN, HIDDEN),
    "k": (HIDDEN, HIDDEN),
    "v": (HIDDEN, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (HIDDEN, INTERMEDIATE),
    "up": (HIDDEN, INTERMEDIATE),
    "down": (INTERMEDIATE, HIDDEN),
}
"""Of one layer, (in, out)."""
NORMS = {"attention_norm": (HIDDEN,), "mlp_norm": (HIDDEN,)}
TOKENS = (2, 16, HIDDEN)

Layer = dict[str, jax.Array]
Pairs = dict[str, LoraPair]
Linear = Callable[[jax.Array, str], jax.Array]
Lower = Callable[[], Any]
"""Trace and lower one program, anew at each call."""


class Sides(NamedTuple):
    """The adapter's gradient by hand and by the rewrite, and the trace that a rewrite needs."""

    hand_written: Lower
    rewrite: Lower
    base_trace: Lower
    """The decoder without LoRA, traced and not lowered."""


class Times(NamedTuple):
    """Median seconds of CPU time."""

    hand_written: float
    rewrite: float
    floor: float
    """What is written by hand, after one trace of the base function: it has to be seen first."""

    @property
    def ratio(self) -> float:
        """The rewrite's time as a multiple of hand-written LoRA's."""
        return self.rewrite / self.hand_written


def trace_times(layers: int, rounds: int, *, scanned: bool = False) -> Times:
    """CPU seconds of tracing and lowering the adapter's gradient, each side in turn."""
    sides = unrolled_sides(layers) if not scanned else scanned_sides(layers)
    for lower in sides:
        lower()
    times = [[cpu_seconds(lower) for lower in sides] for _ in range(rounds)]
    hand_written, rewrite, base_trace = map(statistics.median, zip(*times, strict=True))
    return Times(hand_written, rewrite, hand_written + base_trace)


def cpu_seconds(lower: Lower) -> float:
    """CPU time of one call from empty caches, without what the collector owes to earlier ones."""
    jax.clear_caches()
    gc.collect()
    started = time.process_time()
    lower()
    return time.process_time() - started


def unrolled_sides(layers: int, dtype: Any = jnp.float32, mode: Mode = "low_rank") -> Sides:
    """The decoder as a Python loop over a list of layers."""

    def model_fn(params: list[Layer], x: jax.Array) -> jax.Array:
        for layer in params:
            x = decoder_layer(layer, x, partial(linear, layer))
        return x

    def by_hand(params: list[Layer], adapter: Pairs, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(params):
            pairs = {name: adapter[f"{i}/{name}"] for name in KERNELS}
            x = decoder_layer(layer, x, partial(linear_with_lora, layer, pairs))
        return x

    params = [_shapes({**KERNELS, **NORMS}, dtype) for _ in range(layers)]
    return _sides(model_fn, by_hand, params, rf"\d+/({'|'.join(KERNELS)})", dtype, mode)


def scanned_sides(layers: int, dtype: Any = jnp.float32) -> Sides:
    """The decoder as one `jax.lax.scan` over layers stacked along a leading axis."""

    def model_fn(params: Layer, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            return decoder_layer(layer, x, partial(linear, layer)), None

        return lax.scan(step, x, params)[0]

    def by_hand(params: Layer, adapter: Pairs, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, both: tuple[Layer, Pairs]) -> tuple[jax.Array, None]:
            return decoder_layer(both[0], x, partial(linear_with_lora, *both)), None

        return lax.scan(step, x, (params, adapter))[0]

    shapes = {name: (layers, *shape) for name, shape in {**KERNELS, **NORMS}.items()}
    return _sides(model_fn, by_hand, _shapes(shapes, dtype), "|".join(KERNELS), dtype)


def linear(layer: Layer, x: jax.Array, name: str) -> jax.Array:
    """x·W."""
    return x @ layer[name]


def linear_with_lora(layer: Layer, pairs: Pairs, x: jax.Array, name: str) -> jax.Array:
    """x·W + (x·A)·(scale·B) over one axis of tokens, summed in float32."""
    y = x @ layer[name]
    a, b = pairs[name].a.astype(x.dtype), (pairs[name].b * SCALE).astype(x.dtype)
    hidden = jnp.matmul(x.reshape(-1, x.shape[-1]), a, preferred_element_type=jnp.float32)
    update = jnp.matmul(hidden.astype(x.dtype), b, preferred_element_type=jnp.float32)
    return (y.astype(jnp.float32) + update.reshape(y.shape)).astype(y.dtype)


def decoder_layer(layer: Layer, x: jax.Array, linear: Linear) -> jax.Array:
    """One layer of the Llama kind, without rotary positions or mask; x is (batch, time, hidden)."""
    h = rms_norm(x, layer["attention_norm"])
    heads = (*x.shape[:2], HEADS, HIDDEN // HEADS)
    q, k, v = (linear(h, name).reshape(heads) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) * heads[-1] ** -0.5)
    x = x + linear(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape), "o")
    h = rms_norm(x, layer["mlp_norm"])
    return x + linear(jax.nn.silu(linear(h, "gate")) * linear(h, "up"), "down")


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x over its root mean square, times a weight."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def _sides(
    model_fn: Callable,
    by_hand: Callable,
    params: Any,
    targets: str,
    dtype: Any,
    mode: Mode = "low_rank",
) -> Sides:
    x = jax.ShapeDtypeStruct(TOKENS, dtype)
    config = lora.LoraConfig(rank=RANK, alpha=SCALE * RANK, targets=targets)
    plan = lora.plan(model_fn, params, x, config=config)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, plan))
    args = params, adapter, x
    return Sides(
        hand_written=lambda: _gradient(by_hand).lower(*args),
        rewrite=lambda: _gradient(lora.adapt(model_fn, plan, mode=mode)).lower(*args),
        base_trace=lambda: jax.make_jaxpr(lambda *args: model_fn(*args))(params, x),
    )


def _gradient(function: Callable) -> Any:
    """The jitted gradient of its sum with respect to the adapter alone."""
    return jax.jit(lambda *args: jax.grad(lambda *args: function(*args).sum(), 1)(*args))


def _shapes(shapes: dict[str, tuple[int, ...]], dtype: Any) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
