"""Eight CPU devices for every test, and programs that are compiled in a fifth of the time.

pmap, shard_map and meshes need several devices, and how many there are is fixed once the first
array is made. A program on one device runs as it did, and one setting for all files means that no
file's result depends on which ran before it.
"""

import os

import jax

jax.config.update("jax_num_cpu_devices", 8)

# Models here are so small that XLA takes far longer to make quick machine code than they run. How
# many products a program has and what it holds is settled before, and not changed by these.
_CODE_IN_LESS_TIME = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
# Later XLAs end the process at a flag that they don't know. The core's tests are run with one of
# them too, and so also in the code that users get.
_KNOWN = jax.__version_info__ < (0, 11)


def pytest_configure(config):
    """The default run, and the programs that it starts; ``-m slow`` compiles as users do."""
    if _KNOWN and config.option.markexpr == "not slow":
        os.environ.setdefault("XLA_FLAGS", " ".join(_CODE_IN_LESS_TIME))
