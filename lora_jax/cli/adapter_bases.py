"""The base of an adapter that is converted: what it is called, its parameters and its modules."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_jax.cli import runs
from lora_jax.errors import InputError

if TYPE_CHECKING:
    from interop.adapter_format import Given
    from interop.keymaps import Keymap
    from lora_jax.models.config import DecoderConfig
    from lora_jax.site import Plan


class AdapterBase(NamedTuple):
    """A base model without what only generation needs."""

    name: str
    source: str
    config: "DecoderConfig"
    params: Any
    digest: str
    keymap: "Keymap"
    """Of torch's modules, as PEFT names them."""
    file_keymap: "Keymap"
    """Of files other than PEFT's, which have a module for each expert."""

    @property
    def about(self) -> dict[str, str]:
        """What an adapter's manifest remembers of it."""
        return {"model": self.name, "source": self.source, "digest": self.digest}


def load_adapter_base(model: str) -> AdapterBase:
    """Load a base by alias, directory, file or hub id; its parameters stay on the host.

    Raises:
      InputError: it isn't there, or isn't implemented.
    """
    from interop import pretrained
    from interop.families import file_keymap, keymap_of
    from lora_jax.cli.base import digest

    found = pretrained.load(model)
    config, params = found.config, found.params
    tables = keymap_of(config), file_keymap(config)
    return AdapterBase(found.name, found.source, config, params, digest(params), *tables)


def model_of(source: Path, model: str | None) -> str:
    """The base that is given, or that a run or its adapter names.

    Raises:
      InputError: neither says.
    """
    from interop import peft
    from interop.any_adapter import peft_directory

    directory = peft_directory(source)
    if model is None and directory is not None:
        model = peft.base_of(directory).get("model")
    return runs.model_of(source, model)


def given_of(base: AdapterBase, **more: Any) -> "Given":
    """What formats leave out that the base knows, and what else is given."""
    from interop.adapter_format import Given
    from interop.adapter_plan import base_modules

    modules = base_modules(base.params, base.file_keymap)
    return Given(base=modules, head_dim=base.config.head_dim, config=base.config, **more)


def read_for(
    base: AdapterBase, source: Path, given: "Given", format: str | None
) -> tuple[Any, "Plan", tuple[str, ...]]:
    """The adapter of any file or directory for a base: adapter, plan, and notes of its reader.

    Raises:
      InputError: it can't be read, doesn't fit the base, or was trained on another one.
    """
    from interop import peft
    from interop.adapter_formats import require_asked
    from interop.adapter_plan import to_plan
    from interop.any_adapter import open_adapter, peft_directory

    directory = peft_directory(source)
    if directory is None or format not in (None, "peft"):
        file = open_adapter(source, given, format=format).adapter
        require_asked(given, [file.format])
        return *to_plan(file, base.params, base.file_keymap), file.notes
    require_asked(given, ["peft"])
    trained_on = peft.base_of(directory).get("digest")
    if trained_on not in (None, base.digest):
        raise InputError(
            f"{directory} was trained on another base than {base.name} ({base.source}): name its "
            "own with --model"
        )
    notes = peft.notes(directory, base.params, keymap=base.keymap)
    return *peft.read(directory, base.params, keymap=base.keymap), notes


def require_absent(out: Path) -> None:
    """Raise an InputError if there is something at ``out``, which would be overwritten."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} already exists: name another, or remove it first")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out.absolute().parent}: no such directory to write {out.name} to")
