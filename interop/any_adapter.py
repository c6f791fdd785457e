"""Whatever holds an adapter, as an adapter by torch module: NumPy alone.

A run directory, a PEFT directory, a llama.cpp ``.gguf``, or a file of `interop.adapter_formats`.
"""

import os
from pathlib import Path

from interop import peft_file
from interop.adapter_file import FileAdapter
from interop.adapter_format import Given
from lora_jax.errors import InputError

RUN_ADAPTER = "adapter"
"""Where a run of ``lora-jax train`` keeps its PEFT directory."""
_EMPTY = peft_file.PeftFile(FileAdapter("none", {}), {}, {})


def open_adapter(
    path: str | os.PathLike, given: Given | None = None, *, format: str | None = None
) -> peft_file.PeftFile:
    """Read an adapter without its plan; config and base are those of PEFT directories.

    Args:
      path: what holds it.
      given: what formats leave out, such as alpha. Without the base's config the rows of q and k
        in a ``.gguf`` stay in llama.cpp's order.
      format: ``peft``, ``gguf`` or a key of `interop.adapter_formats.FORMATS`; told from the
        content by default.

    Raises:
      InputError: there is nothing, nothing that is known, or nothing that is whole.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    directory = peft_directory(path)
    if directory and format in (None, "peft"):
        return peft_file.read(directory)
    return _EMPTY._replace(adapter=_of_other_format(path, given, format))


def peft_directory(path: Path) -> Path | None:
    """The PEFT directory that ``path`` is, or that of the run there; None for other formats.

    An adapter of its own comes first: beside it a folder ``adapter`` is PEFT's second adapter.
    """
    directory = path if (path / peft_file.CONFIG).is_file() else path / RUN_ADAPTER
    return directory if peft_file.is_directory_of_peft(directory) else None


def _of_other_format(path: Path, given: Given | None, format: str | None) -> FileAdapter:
    if path.suffix == ".gguf" and format in (None, "gguf"):
        from interop import gguf_adapter

        config = given.config if given else None
        return gguf_adapter.read(path, config) if config else gguf_adapter.read_for_inspection(path)
    from interop import adapter_formats

    if format in ("peft", "gguf"):
        raise InputError(f"{path} is no {format} adapter: leave out the format, or name another")
    return adapter_formats.read(path, given, format=format)
