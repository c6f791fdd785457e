"""Where an adapter's files are, and that they are what the directory itself holds."""

import re
from pathlib import Path

from lora_jax.errors import InputError
from lora_jax.manifest import MANIFEST

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def located(directory: Path, adapter_name: str | None = None) -> Path:
    """The folder of one adapter: the directory itself, or a folder in it of the adapter's name.

    PEFT saves the adapter ``default`` in the directory itself and others in folders.

    Raises:
      InputError: there is none (naming those that are there), the name could be a path, or a
        file is a link to somewhere else than the directory or the blobs of a hub's cache.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    if adapter_name is not None and not _NAME.fullmatch(adapter_name):
        raise InputError(
            f"adapter_name is {adapter_name[:80]!r}, expected up to 64 letters, digits, '.', '_' "
            "and '-', the first a letter or digit"
        )
    others = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    in_itself = adapter_name in (None, "default") and ((directory / CONFIG).is_file() or not others)
    if adapter_name not in others and not in_itself:
        asked = f"adapter {adapter_name!r}" if adapter_name else "adapter of its own"
        raise InputError(f"{directory} holds no {asked}: in its folders are {others or 'none'}")
    folder = directory if adapter_name not in others else directory / str(adapter_name)
    _require_inside(folder, directory)
    return folder


def _require_inside(folder: Path, directory: Path) -> None:
    root = directory.resolve()
    allowed = [root, *(p.parent / "blobs" for p in root.parents if p.name == "snapshots")]
    paths = [folder, *(folder / name for name in (CONFIG, WEIGHTS, PICKLED_WEIGHTS, MANIFEST))]
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise InputError(f"{path} is a link to {target}, outside of {directory}: copy it there")
