"""Every format of adapter files, told by content: one table to read and write them all.

>>> print(*FORMATS, sep=", ")
loralib, lora_layer, minimind, kohya, diffusers, mlx, torchtune
"""

import os
from collections.abc import Collection
from pathlib import Path

from interop import lora_diffusers, lora_kohya, lora_minimind, lora_mlx, lora_pth, lora_torchtune
from interop.adapter_file import FileAdapter
from interop.adapter_format import Content, Format, Given, open_content
from lora_jax.errors import InputError

FORMATS: dict[str, Format] = {
    **lora_pth.FORMATS,
    **lora_minimind.FORMATS,
    **lora_kohya.FORMATS,
    **lora_diffusers.FORMATS,
    **lora_mlx.FORMATS,
    **lora_torchtune.FORMATS,
}
# What a person may say of a file; the rest of `Given` is the base's.
_TOLD = ("alpha", "rotary", "enable_lora")


def read(
    path: str | os.PathLike, given: Given | None = None, *, format: str | None = None
) -> FileAdapter:
    """Read an adapter file or directory of any format.

    Args:
      path: the file, or the directory of formats that have one.
      given: what the file itself doesn't say.
      format: a key of `FORMATS`; told from the content by default.

    Raises:
      InputError: no format or several are recognised, the file can't be read safely, or it is
        no whole adapter of its format: everything that is wrong, named.
    """
    content = open_content(Path(path))
    return FORMATS[format_of(content, format)].read(content, given or Given())


def write(
    path: str | os.PathLike, file: FileAdapter, format: str, given: Given | None = None
) -> tuple[str, ...]:
    """Write an adapter in a format, atomically; equal input gives equal bytes.

    Args:
      path: a file, which is replaced if it exists, or for a format of directories one that is
        absent or empty.
      file: the adapter by torch module.
      format: a key of `FORMATS`.
      given: what the format's names and orders depend on.

    Returns:
      What was folded, filled up or has to be told to readers, a sentence each.

    Raises:
      InputError: the format can't be written, or can't hold the adapter: by name, why.
    """
    _require_known(format)
    known = FORMATS[format]
    if known.write is None:
        raise InputError(f"{format} files can be read, and not written")
    if not (file.modules or file.whole or file.rows):
        raise InputError(f"there is nothing to write to {path}: the adapter is empty")
    return known.write(Path(path), file, given or Given())


def format_of(content: Content, format: str | None = None) -> str:
    """The format of an opened file, told from it or as it is given."""
    if format is not None:
        _require_known(format)
        return format
    found = [name for name, known in FORMATS.items() if known.detect(content)]
    if len(found) != 1:
        what = f"may be {' or '.join(found)}: say which" if found else "is none that is known"
        examples = ", ".join(sorted(content.tensors)[:3]) or "none"
        raise InputError(
            f"{content.path}: its format {what} (formats: {', '.join(FORMATS)}; its tensors: "
            f"{examples[:200]})"
        )
    return found[0]


def require_asked(given: Given, formats: Collection[str]) -> None:
    """Raise an InputError if a person says something that none of the formats leaves open.

    >>> require_asked(Given(alpha=16.0), ["loralib", "peft"])
    >>> require_asked(Given(alpha=16.0), ["peft"])
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: alpha=16.0 says nothing of peft: it goes with loralib, ...
    """
    nothing = Given()
    for field in _TOLD:
        told = getattr(given, field)
        asking = [name for name, known in FORMATS.items() if field in known.asks]
        if told != getattr(nothing, field) and not {*asking} & {*formats}:
            raise InputError(
                f"{field}={told!r} says nothing of {' or '.join(formats)}: it goes with "
                f"{', '.join(asking)}"
            )


def _require_known(format: str) -> None:
    if format not in FORMATS:
        raise InputError(f"no adapter format {format!r}: there are {', '.join(FORMATS)}")
