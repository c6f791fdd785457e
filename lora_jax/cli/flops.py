"""FLOPs of one training step, from XLA and from the formula.

Of an adapted weight of d_in x d_out, T tokens cost 4·d_in·d_out·T (forward, and the gradient of
the activation; the weight itself has none) and its adapter of rank r 6·r·(d_in + d_out)·T.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax.cli.bench_flops import Options
from lora_jax.cli.options import LINEAR_LAYERS
from lora_jax.cli.preparing import adapted_loss, logits_of_batch
from lora_jax.cli.tasks import Example
from lora_jax.data.batches import Batch
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import param_shapes
from lora_jax.models.presets import PRESETS
from lora_jax.site import Plan
from lora_jax.train.optim import adamw
from lora_jax.train.step import init_state, make_step


def step_flops(options: Options) -> tuple[float, dict[str, float]]:
    """What XLA counts for the compiled step, and the formula's parts."""
    config = PRESETS[options.model]
    once, plan = _counted(replace(config, scan_unroll=1), options)
    twice, _ = _counted(replace(config, scan_unroll=2), options)
    # XLA counts the body of a loop once, whatever its trip count: two layers in the body
    # instead of one tell what a layer costs.
    counted = once + (config.num_layers - 1) * (twice - once)
    return counted, formula(config, plan, options)


def formula(config: DecoderConfig, plan: Plan, options: Options) -> dict[str, float]:
    """FLOPs by part of the step; attention and head are frozen: forward and activation gradient."""
    tokens = options.batch_size * options.length
    sizes = [(site.shape[0], site.fan_in, site.fan_out, site.rank) for site in plan.sites]
    scores = tokens * options.length * config.num_heads * config.head_dim
    return {
        "frozen weights": sum(4.0 * n * i * o * tokens for n, i, o, _ in sizes),
        "low-rank products": sum(6.0 * n * r * (i + o) * tokens for n, i, o, r in sizes),
        "attention": 12.0 * config.num_layers * scores,
        "head": 4.0 * config.hidden_size * config.vocab_size * options.predictions,
    }


def lowered_step(config: DecoderConfig, options: Options) -> tuple[Any, Plan]:
    """The compiled update over shapes alone, and its plan."""
    params, batch = param_shapes(config), _batch_shapes(options)
    model_fn = logits_of_batch(config)
    lora_config = lora.LoraConfig(
        rank=options.rank, alpha=2.0 * options.rank, targets=LINEAR_LAYERS
    )
    plan = lora.plan(model_fn, params, batch, config=lora_config)
    tx = adamw(1e-3)
    state = jax.eval_shape(lambda: init_state(lora.init(jax.random.key(0), params, plan), tx))
    step = make_step(adapted_loss(model_fn, plan), tx)
    lowered = jax.jit(step, donate_argnums=0).lower(state, params, Example(batch))
    return lowered.compile(), plan


def _counted(config: DecoderConfig, options: Options) -> tuple[float, Plan]:
    compiled, plan = lowered_step(config, options)
    return compiled.cost_analysis()["flops"], plan


def _batch_shapes(options: Options) -> Batch:
    grid = jax.ShapeDtypeStruct((options.batch_size, options.length), jnp.int32)
    row = jax.ShapeDtypeStruct((options.predictions,), jnp.int32)
    weights = jax.ShapeDtypeStruct(row.shape, jnp.float32)
    return Batch._make((grid, grid, grid, row, row, weights))
