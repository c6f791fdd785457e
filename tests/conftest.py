"""Eight CPU devices for every test, and programs that are compiled in less time.

pmap, shard_map and meshes need several devices, and how many there are is fixed once the first
array is made. A program on one device runs as it did, and one setting for all files means that no
file's result depends on which ran before it.
"""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

_TESTS = Path(__file__).parent
# The rooms whose tests ask what is computed, of models so small that XLA takes longer to optimise
# them than they run; the others ask what is compiled, or compare speeds.
_COMPILED_IN_LESS_TIME = {"cli", "examples", "interop", "models", "train"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Around a test and what is set up for it; programs that it starts do as it does."""
    room = item.path.relative_to(_TESTS).parts[0] if item.path.is_relative_to(_TESTS) else ""
    marked = any(map(item.get_closest_marker, ("optimised", "slow")))
    few = room in _COMPILED_IN_LESS_TIME and not marked
    jax.config.update("jax_disable_most_optimizations", few)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(few))
    return (yield)
