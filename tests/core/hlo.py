"""Reads compiled programs: which arrays are computed from the first inputs, and where."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

PASSED_ON = {"parameter", "get-tuple-element", "tuple", "bitcast"}
"""These name an array that something else computed."""

Dependence = Any
"""Of an array, whether it depends on the inputs in question; of a tuple, that of each element."""


class Instruction(NamedTuple):
    """``name = shape opcode(operands), attributes`` of a program's text."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def inputs(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.-]+)", self.operands)

    @property
    def index(self) -> int:
        """Which element a get-tuple-element takes."""
        return int(re.findall(r"index=(\d+)", self.attributes)[0])

    def called(self, *roles: str) -> list[str]:
        """The computations named in the attributes of those roles."""
        lists = re.findall(rf"(?:{'|'.join(roles)})=(\{{[^}}]*\}}|%[\w.-]+)", self.attributes)
        return [name for names in lists for name in re.findall(r"%([\w.-]+)", names)]


class Array(NamedTuple):
    """An array that an instruction computes."""

    computation: str
    instruction: Instruction
    in_loop: bool

    @property
    def size(self) -> int:
        """How many elements it has."""
        dims = re.findall(r"\[([\d,]*)\]", self.instruction.shape)[0]
        return math.prod(int(dim) for dim in dims.split(",") if dim)


def arrays_depending_on(text: str, inputs: int) -> list[Array]:
    """Every array of the program that is computed from one of its first ``inputs`` parameters."""
    computations, entry = _parsed(text)
    parameters = [each for each in computations[entry] if each.opcode == "parameter"]
    walk = _Walk(computations)
    walk.run(entry, [number < inputs for number in range(len(parameters))], in_loop=False)
    return list(walk.found.values())


@dataclass
class _Walk:
    computations: dict[str, list[Instruction]]
    found: dict[tuple[str, str], Array] = field(default_factory=dict)

    def run(self, name: str, inputs: Sequence[Dependence], *, in_loop: bool) -> Dependence:
        """What the computation's result depends on, given what its parameters depend on."""
        values: dict[str, Dependence] = {}
        root = ""
        for each in self.computations[name]:
            if each.opcode == "parameter":
                value = inputs[int(each.operands)]
            else:
                value = self.result(each, [values[k] for k in each.inputs], in_loop)
            values[each.name] = value
            root = each.name if each.is_root else root
            if value is True and each.opcode not in PASSED_ON:
                self.found[name, each.name] = Array(name, each, in_loop)
        return values[root]

    def result(self, each: Instruction, inputs: list[Dependence], in_loop: bool) -> Dependence:
        """What one instruction's result depends on."""
        rules: dict[str, Callable[[], Dependence]] = {
            "tuple": lambda: tuple(inputs),
            "get-tuple-element": lambda: inputs[0][each.index],
            "opt-barrier": lambda: inputs[0],
            "while": lambda: self.loop(each.called("body")[0], inputs[0]),
            "conditional": lambda: self.branches(each, inputs[1:], in_loop),
            "fusion": lambda: self.run(each.called("calls")[0], inputs, in_loop=in_loop),
            "call": lambda: self.run(each.called("to_apply")[0], inputs, in_loop=in_loop),
        }
        return rules.get(each.opcode, lambda: _any(each.shape, inputs))()

    def loop(self, body: str, state: Dependence) -> Dependence:
        """Of the carry after any number of steps."""
        after = _either(state, self.run(body, [state], in_loop=True))
        return state if after == state else self.loop(body, after)

    def branches(self, each: Instruction, inputs: list[Dependence], in_loop: bool) -> Dependence:
        """Of a conditional, whichever branch runs; the choice itself does not count."""
        names = each.called("branch_computations", "true_computation", "false_computation")
        first, *others = (
            self.run(name, [value], in_loop=in_loop)
            for name, value in zip(names, inputs, strict=True)
        )
        for other in others:
            first = _either(first, other)
        return first


def _either(left: Dependence, right: Dependence) -> Dependence:
    if not isinstance(left, tuple):
        return left or right
    return tuple(_either(a, b) for a, b in zip(left, right, strict=True))


def _any(shape: str, inputs: Iterable[Dependence]) -> Dependence:
    depends = any(_leaves(inputs))
    return (depends,) * len(re.findall(r"\w+\[", shape)) if shape.startswith("(") else depends


def _leaves(values: Iterable[Dependence]) -> Iterable[bool]:
    for value in values:
        yield from _leaves(value) if isinstance(value, tuple) else (value,)


def _parsed(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif found := re.match(r"\s+(ROOT )?%([\w.-]+) = (.*)$", line):
            computations[current].append(_instruction(found[2], found[3], bool(found[1])))
    return computations, entry


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, call = text[:end], text[end:].lstrip()
    opcode, rest = call.split("(", 1)
    end = _closing("(" + rest)
    return Instruction(name, shape, opcode, rest[: end - 2], rest[end - 1 :], is_root)


def _closing(text: str) -> int:
    """Where the parenthesis that ``text`` starts with is closed, and one further."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"no closing parenthesis in {text!r}")


def equations(jaxpr):
    """All equations, those of inner functions among them: JAX 0.12 inlines a jit later."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
