"""Eight CPU devices for every test: how many there are is fixed once the first array is made.

pmap, shard_map and meshes need several. A program on one device runs as it did, and one setting
for all files means that no file's result depends on which ran before it.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)
