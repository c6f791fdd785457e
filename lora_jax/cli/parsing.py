"""From the command line and a YAML file to one frozen dataclass, and back to YAML."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from lora_jax.errors import InputError

Options = TypeVar("Options")

CONFIG = "config"
"""The field, where a command has it, that names a YAML file."""
PRESET = "preset"
"""The field, where a command has it, that names rows of `lora_jax.cli.recipes`."""


def parse(kind: type[Options], words: Sequence[str], program: str, about: str | None) -> Options:
    """Fill the dataclass ``kind`` from flags and, where it has them, from presets and a YAML file.

    Presets come first and the file's values next, so flags win. Unknown flags end the program
    with status 2.

    Raises:
      InputError: the YAML file can't be read or has an unknown key, or there is no such preset.
    """
    import tyro

    fields = {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    from_file = _file_flags(kind, words) if CONFIG in fields else []
    has_presets = PRESET in fields
    from_presets = _preset_flags(kind, [*from_file, *words]) if has_presets else []
    return tyro.cli(
        kind,
        args=[*from_presets, *from_file, *words],
        prog=program,
        description=(about or "").strip() + (_about_presets() if has_presets else ""),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def as_yaml(options: Any) -> str:
    """Resolved options as YAML that `parse` reads back."""
    import yaml

    values = dataclasses.asdict(options)
    for name in (CONFIG, PRESET):  # what they say is in the other values
        values.pop(name, None)
    return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; an InputError where there is none."""
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _strict_loader())
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"config file {path} is nested too deeply") from error
    if not isinstance(content, Mapping):
        raise InputError(f"config file {path} must hold 'group: {{option: value}}' mappings")
    return content


def _strict_loader() -> Any:
    """PyYAML's safe loader, to which a key that stands twice is an error and not the last one."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(
                    f"{', '.join(twice)} stands twice in the mapping at line {line}"
                )
            return super().construct_mapping(node, deep)

    return Loader


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _file_flags(kind: type, words: Sequence[str]) -> list[str]:
    path = _value_of(f"--{CONFIG}", words)
    if path is None:
        return []
    flags = dict(_flags(kind))
    given = dict(_leaves(read_yaml(Path(path))))
    unknown = [key for key in given if key not in flags]
    if unknown:
        hints = ", ".join(f"{key!r} (nearest: {_nearest(key, flags)!r})" for key in unknown)
        raise InputError(f"config file {path}: unknown key {hints}")
    words_by_key = [_words(flags[key], value) for key, value in given.items() if value is not None]
    return [word for words in words_by_key for word in words]


def _preset_flags(kind: type, words: Sequence[str]) -> list[str]:
    """What the presets say, as far as the command has options for it."""
    from lora_jax.cli.recipes import options_of

    flags = dict(_flags(kind))
    known = _leaves(options_of(_values_of(f"--{PRESET}", words)))
    found = [_words(flags[key], value) for key, value in known if key in flags]
    return [word for words in found for word in words]


def _about_presets() -> str:
    from lora_jax.cli.recipes import described

    return f"\n\nPresets, whose alpha goes with their own rank:\n\n{described()}"


def _values_of(flag: str, words: Sequence[str]) -> list[str]:
    """The words after the last ``flag``, up to the next flag; or what follows its ``=``."""
    given = [at for at, word in enumerate(words) if word.partition("=")[0] == flag]
    if not given:
        return []
    last = given[-1]
    joined = [word for word in [words[last].partition("=")[2]] if word]
    rest = takewhile(lambda word: not word.startswith("-"), words[last + 1 :])
    return [*joined, *rest]


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """What follows ``flag``, as the next word or after ``=``; None where it isn't given."""
    after = dict(zip(words, [*words[1:], None], strict=False))
    joined = (word.partition("=")[2] for word in words if word.startswith(f"{flag}="))
    return after.get(flag) or next(joined, None)


def _flags(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option's key in a YAML file, such as ``lora.rank``, and its flag."""
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(each.type):
            yield from _flags(each.type, f"{prefix}{each.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{each.name}", f"--{each.name.replace('_', '-')}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        group = isinstance(value, Mapping) and value
        yield from _leaves(value, f"{name}.") if group else [(name, value)]


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        raise InputError(f"config file: {flag} is an empty mapping: give it a value, or drop it")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    values = [str(each) for each in (value if isinstance(value, list) else [value])]
    dashed = [each for each in values if isinstance(value, str | list) and each.startswith("-")]
    if dashed:
        raise InputError(
            f"config file: {flag} has {dashed}, which would be read as flags: reword it"
        )
    return [flag, *values]


def _nearest(key: str, keys: Mapping[str, str]) -> str:
    return difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
