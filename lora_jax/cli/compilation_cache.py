"""JAX's persistent compilation cache: a second start compiles nothing again."""

import jax


def enable_compilation_cache() -> None:
    """Keep compiled programs in the ``xla`` folder of the cache directory, for this user alone."""
    from interop.wheel import default_cache

    directory = default_cache() / "xla"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
