"""JAX's persistent compilation cache: a second start compiles nothing again."""

import jax

from lora_jax.errors import InputError


def enable_compilation_cache() -> None:
    """Keep compiled programs in the ``xla`` folder of the cache directory, for this user alone."""
    from interop.wheel import default_cache

    directory = default_cache() / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(
            f"can't make the cache directory {directory}: {error.strerror}; "
            "point LORA_JAX_CACHE to one that can be written"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
