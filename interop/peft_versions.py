"""Which side A and B of stacked experts stand on, which PEFT has changed twice.

==========  ==========================  ==========================
PEFT        (expert, out, in)           (expert, in, out)
==========  ==========================  ==========================
0.17, 0.18  A has out, B has in         A has in, B has out
0.19.0      A has out, B has in         A has out, B has in
0.19.1 on   A has in, B has out         A has in, B has out
==========  ==========================  ==========================

Where both sizes differ the tensors tell; where they are equal the version in the config does.
"""

import re
from collections.abc import Iterator, Mapping

from interop.keymaps import Rule
from interop.peft_matching import PeftConfig, Setting
from interop.peft_modules import PARAMETERS, Base, roles_of

WRITTEN_AS = "0.19.1"
"""The release whose layout is written here."""


def swapped_parameters(
    config: PeftConfig,
    shapes: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, Setting],
    base: Base,
) -> set[str]:
    """The adapted parameters whose A has the outputs and whose B has the inputs.

    Args:
      config: whose version decides for square weights.
      shapes: of the file's tensors.
      settings: every target.
      base: names of both sides.
    """
    return {
        parameter
        for parameter, rule, (fan_in, fan_out) in _experts(settings, base)
        if _is_swapped(
            rule,
            shapes.get(f"{base.key(parameter, settings)}.lora_A.weight", (0,))[-1],
            (fan_in, fan_out),
            config.peft_version,
        )
    }


def undecided(config: PeftConfig, settings: Mapping[str, Setting], base: Base) -> Iterator[str]:
    """Square weights in a file that doesn't say which PEFT it is from."""
    if _version(config.peft_version):
        return
    for parameter, _, (fan_in, fan_out) in _experts(settings, base):
        if fan_in == fan_out:
            yield (
                f"{parameter!r} is square, and peft_version is {config.peft_version!r}: A and B "
                "could stand on either side; name the PEFT that wrote it in adapter_config.json"
            )


def _experts(
    settings: Mapping[str, Setting], base: Base
) -> Iterator[tuple[str, Rule, tuple[int, int]]]:
    for target in settings:
        path, _ = base.parameters.get(target, ("", ()))
        rule = base.rules.get(path)
        if rule is None or rule.kind not in PARAMETERS:
            continue
        shape = base.leaves[path].shape
        roles = roles_of(rule, shape)
        if roles.count("stack") > rule.stack:
            yield target, rule, (shape[roles.index("in")], shape[roles.index("out")])


def _is_swapped(rule: Rule, width: int, sizes: tuple[int, int], version: str | None) -> bool:
    fan_in, fan_out = sizes
    if fan_in != fan_out:
        return width == fan_out
    release = _version(version)
    return release == (0, 19, 0) or (release < (0, 19, 0) and rule.kind == "parameter")


def _version(text: str | None) -> tuple[int, ...]:
    """The three numbers of a release, or none."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", text or "")
    return tuple(int(part or 0) for part in match.groups()) if match else ()
