"""bfloat16: products accumulate in float32, and base and update are rounded once, together."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora

from hlo import equations

RNG = np.random.default_rng(0)


def random(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def largest_error(got, want):
    return float(jnp.abs(got.astype(jnp.float64) - want).max())


def test_bfloat16_is_as_close_to_the_truth_as_merging_first():
    params, x = {"w": random(64, 64) / 8}, random(32, 64)
    plan = lora.plan(
        lambda p, x: x @ p["w"], params, x, config=lora.LoraConfig(rank=8, alpha=4, targets="w")
    )
    site = plan["w"]
    pair = lora.LoraPair(
        random(*site.a_shape, dtype=jnp.float32) / 8, random(*site.b_shape, dtype=jnp.float32)
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, {"w": pair}, x))
    truth = wide[2] @ (wide[0]["w"] + site.scale * wide[1]["w"].a @ wide[1]["w"].b)
    ulp = float(jnp.abs(truth).max()) * 2**-8
    ours, merged = (
        lora.adapt(lambda p, x: x @ p["w"], plan, mode=mode)(params, {"w": pair}, x)
        for mode in ("low_rank", "merge")
    )
    assert ours.dtype == jnp.bfloat16
    assert largest_error(ours, truth) <= largest_error(merged, truth) + ulp
    a, b = pair.a.astype(jnp.bfloat16), pair.b.astype(jnp.bfloat16)
    rounded_twice = x @ params["w"] + jnp.bfloat16(site.scale) * ((x @ a) @ b)
    mean = float(jnp.abs(ours.astype(jnp.float64) - truth).mean())
    assert mean < float(jnp.abs(rounded_twice.astype(jnp.float64) - truth).mean())


def test_factors_are_cast_where_the_function_casts_the_weight():
    params, x = {"w": random(64, 64, dtype=jnp.float32)}, random(32, 64)

    def model_fn(params, x):
        return x @ params["w"].astype(jnp.bfloat16)

    plan = lora.plan(model_fn, params, x, config=lora.LoraConfig(rank=8, targets="w"))
    adapter = lora.init(jax.random.key(0), params, plan)
    jaxpr = jax.make_jaxpr(lora.adapt(model_fn, plan))(params, adapter, x)
    dots = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(dots) == 3
    assert all(v.aval.dtype == jnp.bfloat16 for eqn in dots for v in eqn.invars)
    low_rank = [eqn.outvars[0].aval.dtype for eqn in dots if 8 in eqn.outvars[0].aval.shape]
    assert low_rank == [jnp.float32]
