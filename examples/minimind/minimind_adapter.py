"""MiniMind's LoRA: bound to its square linear layers, trained, saved alone, loaded, merged."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from interop import adapter_formats
from interop.adapter_format import Given
from interop.adapter_plan import base_modules, from_plan, to_plan
from interop.families import keymap_of
from interop.keymaps import Keymap
from lora_jax.adapter import Adapter, shapes_of
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig

from minimind_log import Lesson, Outcome, moved, printer
from minimind_options import Options, schooling_of
from minimind_training import Apply, Record, judge_of, model_function, train


def apply_lora(config: DecoderConfig, params: Any, options: Options) -> tuple[lora.Plan, Adapter]:
    """A of N(0, 0.02), B of zero and a scale of 1 beside every target."""
    settings = lora.LoraConfig(
        rank=options.rank,
        alpha=options.rank,  # a scale of 1
        targets=options.targets,
        init="gaussian",
        init_std=0.02,
    )
    inputs = jax.ShapeDtypeStruct((options.batch_size, options.max_seq_len - 1), jnp.int32)
    plan = lora.plan(model_function(config), params, inputs, config=settings)
    return plan, lora.init(jax.random.key(options.seed + 1), params, plan)


def adapted_model(config: DecoderConfig, plan: lora.Plan) -> Apply:
    """``apply(adapter, params, inputs)`` of the adapted model."""
    adapted = lora.adapt(model_function(config), plan)
    return lambda adapter, params, inputs: adapted(params, adapter, inputs)


def train_adapter(lesson: Lesson, params: Any, config: DecoderConfig, options: Options) -> Outcome:
    """Adapt, count, train and save; load what was saved, and merge it."""
    plan, adapter = apply_lora(config, params, options)
    apply, keymap = adapted_model(config, plan), keymap_of(config)
    path = options.save_dir / f"{options.save_weight}_{options.dim}{'_moe' * options.use_moe}.pth"
    announce, count = printer(lesson, options), itertools.count(1)
    _show(plan, params, keymap)

    def observe(record: Record, adapter: Any) -> None:
        announce(record, adapter)
        if options.save_interval and next(count) % options.save_interval == 0:
            adapter_formats.write(path, from_plan(adapter, plan, keymap, params=params), "minimind")
            print(f"adapter saved to {path}")

    judge = judge_of(apply, lesson.judged)
    before = judge(adapter, params)
    adapter, records = train(
        apply,
        adapter,
        params,
        lesson.trained,
        options.epochs,
        schooling_of(options),
        observe,
    )
    after = judge(adapter, params)
    print(f"LoRA has trained; {moved(before, after)}")
    if options.save_interval:
        file = adapter_formats.read(path, Given(base=base_modules(params, keymap)))
        adapter, plan = to_plan(file, params, keymap)
    check_merge(config, params, adapter, plan, lesson.trained[0].inputs)
    return Outcome(records, before, after)


def _show(plan: lora.Plan, params: Any, keymap: Keymap) -> None:
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes_of(plan))
    names = from_plan(fresh, plan, keymap, params=params).modules
    in_order = [name for name in base_modules(params, keymap) if name in names]
    for name in sorted(in_order, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        print(f"apply lora on module: {name}")
    print(f"parameters with LoRA: {plan.all_parameters}")
    print(f"parameters of LoRA: {plan.trainable}")
    print(f"share of LoRA: {100 * plan.trainable / plan.all_parameters:.2f}%")


def check_merge(
    config: DecoderConfig, params: Any, adapter: Any, plan: lora.Plan, inputs: Any
) -> None:
    """Merge, and see that it computes what the adapter does, which a B of zero would not show.

    Raises:
      InputError: the merge is more than a hundredth off of what the adapter does.
    """
    model_fn = model_function(config)
    plain = jax.jit(model_fn)(params, inputs)[0]
    merged = jax.jit(model_fn)(lora.merge(params, adapter, plan), inputs)[0]
    wanted = jax.jit(adapted_model(config, plan))(adapter, params, inputs)[0]
    does, off = float(abs(wanted - plain).max()), float(abs(merged - wanted).max())
    print(f"merged: logits {off:.1e} from the adapter's, which are {does:.1e} from the base's")
    if not off < 0.01 * does:
        raise InputError(f"the merged logits are {off:.1e} off, where the adapter does {does:.1e}")
