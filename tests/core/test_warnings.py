"""Nothing of ours is deprecated: every way through the library with warnings as errors."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import jax, jax.numpy as jnp
import lora_jax as lora

def layer(hidden, kernel):
    return jnp.tanh(hidden @ kernel), None

def model_fn(params, x):
    hidden = params["embedding"][jnp.arange(8)] + x
    hidden = jax.lax.scan(jax.checkpoint(layer), hidden, params["layers"])[0]
    hidden = jax.lax.cond(hidden.sum() > 0, lambda h: h @ params["branch"], jnp.sin, hidden)
    image = hidden.reshape(1, 4, 2, 6)
    dims = ("NHWC", "HWIO", "NHWC")
    image = jax.lax.conv_general_dilated(
        image, params["conv"], (1, 1), "SAME", dimension_numbers=dims
    )
    rows = image.reshape(8, 6)
    experts = jax.lax.ragged_dot(rows, params["experts"], jnp.array([3, 5], jnp.int32))
    step = lambda i, h: jnp.tanh(h @ params["indexed"][i])
    looped = jax.lax.fori_loop(0, 2, step, experts)
    normed = params["normed"] / jnp.linalg.norm(params["normed"], axis=0)
    return jax.jit(lambda w, h: h @ w.T)(params["embedding"], looped @ normed)

shapes = dict(
    embedding=(8, 6), layers=(3, 6, 6), branch=(6, 6), conv=(3, 3, 6, 6), experts=(2, 6, 6),
    indexed=(2, 6, 6), normed=(6, 6),
)
keys = jax.random.split(jax.random.key(0), len(shapes))
params = {
    name: jax.random.normal(key, shape)
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
}
x = jax.random.normal(jax.random.key(1), (8, 6))
targets = (lora.Rule("normed", dropout=0.0), ".*")
config = lora.LoraConfig(rank=2, targets=targets, dropout=0.1)
plan = lora.plan(model_fn, params, x, config=config)
assert set(plan) == set(shapes)
assert any(use.merged_because for use in plan["normed"].uses)
print(lora.explain(plan))
adapter = lora.init(jax.random.key(2), params, plan)

def loss(adapter, mode, **options):
    return lora.adapt(model_fn, plan, mode=mode)(params, adapter, x, **options).sum()

value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(adapter, "low_rank")
assert set(grads) == set(shapes)
jitted = jax.jit(loss, static_argnums=1)
assert jnp.allclose(value, jitted(adapter, "merge"), rtol=1e-4)
jitted(adapter, "low_rank", dropout_key=jax.random.key(3))

dense = lambda params, x: x @ params["w"]
weight = {"w": params["branch"]}
dense_plan = lora.plan(dense, weight, x, config=lora.LoraConfig(rank=2, targets="w"))
adapters = jax.vmap(lambda key: lora.init(key, weight, dense_plan))(keys)
jax.vmap(lora.adapt(dense, dense_plan), (None, 0, None))(weight, adapters, x)

lora.merge(params, adapter, plan)
axes = {name: " ".join(site.roles) for name, site in plan.items()}
lora.plan_from_axes(params, config, axes)
print("done")
"""


def run(program, *flags):
    command = [sys.executable, *flags, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_every_way_through_the_library_with_warnings_as_errors():
    finished = run(PROGRAM, "-W", "error")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.endswith("done\n")


def test_a_warning_would_fail():
    warned = run(f"import warnings; warnings.warn('old', FutureWarning)\n{PROGRAM}", "-W", "error")
    assert warned.returncode != 0
    assert "FutureWarning: old" in warned.stderr


def test_no_file_mentions_jaxs_private_names():
    files = [path for package in ("lora_jax", "interop") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 20
    private = re.compile(r"\bjax(lib)?\._[a-z]")
    assert [path for path in files if private.search(path.read_text())] == []
