"""Through control flow: each rule walks the inner function and emits the same construct again.

Everything is emitted with JAX's public functions, never by editing an equation's parameters,
because those differ between JAX versions. To add one: write it and give it a row in `CONTROL`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.rewrite.weight import NotLowRank, Weight, leading_slices

CARRIED = NotLowRank("is carried by a loop")


def jit(walk, eqn, *inputs):
    """An inner jit: the same boundary and name, around the rewritten body."""
    inner = walk.function(eqn.params["jaxpr"])
    inner.__name__ = eqn.params["name"]
    return jax.jit(inner)(*inputs)


def remat(walk, eqn, *inputs):
    """jax.checkpoint with its own policy, which is not asked about products with the second factor.

    A policy that saves dots would keep an array of the output's size more for each adapted
    weight; the rank-sized product before it is saved as the policy says.
    """
    second_factors: set[tuple[int, tuple[int, ...]]] = set()
    inner = replace(walk, second_factors=second_factors).function(eqn.params["jaxpr"])
    policy = eqn.params["policy"]

    def saves(primitive, *avals, **params):
        operands = {(number, aval.shape) for number, aval in enumerate(avals)}
        if primitive.name == "dot_general" and operands & second_factors:
            return False
        return policy(primitive, *avals, **params)

    options = {"policy": policy and saves, "prevent_cse": eqn.params["prevent_cse"]}
    return jax.checkpoint(inner, **options)(*inputs)


def call(walk, eqn, *inputs):
    """A closed call without a meaning of its own: walked in place."""
    return walk.function(eqn.params["call_jaxpr"])(*inputs)


def cond(walk, eqn, index, *inputs):
    """lax.cond and lax.switch; each branch is rewritten on its own."""
    branches = [walk.plain_function(branch, eqn) for branch in eqn.params["branches"]]
    return lax.switch(walk.value(index), branches, *inputs)


def while_loop(walk, eqn, *inputs):
    """lax.while_loop: weights may be constants of the condition and the body, not carried."""
    for_cond, for_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = inputs[:for_cond], inputs[for_cond : for_cond + for_body]
    carry = [walk.plain(x, eqn, CARRIED) for x in inputs[for_cond + for_body :]]
    condition = partial(walk.plain_function(eqn.params["cond_jaxpr"], eqn), *cond_consts)

    def more(state):
        return condition(*state[1])[0]

    def body(state):
        step, values = state
        run = walk.at(step).plain_function(eqn.params["body_jaxpr"], eqn)
        return step + 1, run(*body_consts, *values)

    return lax.while_loop(more, body, (0, carry))[1]


def scan(walk, eqn, *inputs):
    """lax.scan: factors are sliced beside W where it is scanned over, or held as constants."""
    consts, init, xs = _scan_inputs(eqn, inputs)
    init = [walk.plain(x, eqn, CARRIED) for x in init]
    slices = [_sliced_input(x) for x in xs]
    # Layers need a number only to draw their own dropout.
    numbers = None if walk.dropout_key is None else jnp.arange(eqn.params["length"])

    def step(carry, number_and_slices):
        number, scanned = number_and_slices
        per_step = [each.rebuild(arrays) for each, arrays in zip(slices, scanned, strict=True)]
        body = walk.at(number).plain_function(eqn.params["jaxpr"], eqn)
        outputs = body(*consts, *carry, *per_step)
        return outputs[: len(carry)], outputs[len(carry) :]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, init, (numbers, [each.arrays for each in slices]), **options)
    return [*carry, *ys]


CONTROL = {
    "jit": jit,
    "pjit": jit,
    "checkpoint": remat,
    "remat2": remat,
    "closed_call": call,
    "core_call": call,
    "cond": cond,
    "while": while_loop,
    "scan": scan,
}


class _Slices(NamedTuple):
    """What a scan slices of one input, and how one step's input is made of the slices."""

    arrays: Any
    rebuild: Callable[[Any], Any]


def _sliced_input(x: Any) -> _Slices:
    return _Slices(*leading_slices(x)) if isinstance(x, Weight) else _Slices(x, lambda each: each)


def _scan_inputs(eqn, inputs) -> tuple[tuple, tuple, tuple]:
    """Constants, initial carry and scanned inputs, on JAX 0.10 and on later versions."""
    if "num_consts" in eqn.params:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    else:
        consts, carry = (len(tree) for tree in eqn.params["ft_in"].unpack()[:2])
    return inputs[:consts], inputs[consts : consts + carry], inputs[consts + carry :]
