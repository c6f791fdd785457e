"""The same update here and in torch with PEFT, timed in turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax.cli.bench_step import Options
from lora_jax.cli.options import LINEAR_LAYERS
from lora_jax.models.decoder import Decoder, init_params
from lora_jax.models.presets import PRESETS
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.step import init_state, make_step

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Update = Callable[[], float]
"""Do one update; the loss before it."""


def step_times(options: Options) -> dict[str, tuple[float, float]]:
    """Median seconds an update and the first loss, here and in torch with PEFT."""
    config = PRESETS[options.model]
    params = init_params(jax.random.key(0), config)
    shape = options.batch_size, options.length
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    sides = {
        "lora_jax": _jax_update(config, params, tokens, options.rank),
        "torch + PEFT": _torch_update(config, params, tokens, options.rank),
    }
    losses = {name: update() for name, update in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, update in sides.items():
            started = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - started)
    return {name: (statistics.median(seconds[name]), losses[name]) for name in sides}


def _jax_update(config: Any, params: Any, tokens: np.ndarray, rank: int) -> Update:
    decoder, batch = Decoder(config), jnp.asarray(tokens, jnp.int32)

    def model_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, tokens)[0]

    lora_config = lora.LoraConfig(rank=rank, alpha=rank, targets=LINEAR_LAYERS)
    plan = lora.plan(model_fn, params, batch, config=lora_config)
    adapted = lora.adapt(model_fn, plan)

    def loss_fn(adapter: Any, params: Any, tokens: jax.Array) -> LossSum:
        logits = adapted(params, adapter, tokens)[:, :-1].reshape(-1, config.vocab_size)
        targets = tokens[:, 1:].reshape(-1)
        return cross_entropy(logits, targets, jnp.ones(targets.shape))

    tx = optax.adamw(1e-4)
    step = jax.jit(make_step(loss_fn, tx), donate_argnums=0)
    state = init_state(lora.init(jax.random.key(0), params, plan), tx)

    def update() -> float:
        nonlocal state
        state, metrics = step(state, params, batch)
        return float(jax.block_until_ready((state, metrics))[1].loss)

    return update


def _torch_update(config: Any, params: Any, tokens: np.ndarray, rank: int) -> Update:
    from interop import hf
    from interop.torch_reference import peft_update

    return peft_update(hf.to_transformers(config, params), tokens, rank, TARGETS)
