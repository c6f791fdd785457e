"""The interpreter: runs a jaxpr with symbolic weights among its values.

An equation that no weight reaches is bound as it stands. One that a weight reaches is given to
its primitive's rule; where there is none, or the rule raises `NotLowRank`, the effective weight
W + ΔW is formed for that equation alone, inside whatever loop body it stands in.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.tree_util import keystr, tree_flatten_with_path

from lora_jax.errors import InputError
from lora_jax.paths import named_leaves, path_key
from lora_jax.rewrite.control import CONTROL
from lora_jax.rewrite.convolutions import CONVOLUTIONS
from lora_jax.rewrite.dots import DOTS
from lora_jax.rewrite.gathers import GATHERS
from lora_jax.rewrite.products import Meeting
from lora_jax.rewrite.sharding import SHARDING, varying
from lora_jax.rewrite.source import as_from, where
from lora_jax.rewrite.stacking import STACKING
from lora_jax.rewrite.views import VIEWS
from lora_jax.rewrite.weight import NotLowRank, RolesContradict, Weight, effective_value

RULES: dict[str, Callable[..., Sequence[Any]]] = {
    **VIEWS,
    **STACKING,
    **DOTS,
    **CONVOLUTIONS,
    **GATHERS,
    **CONTROL,
    **SHARDING,
}
"""From the name of a primitive to ``rule(walk, equation, *inputs) -> outputs``."""


class Note(NamedTuple):
    """What the walk saw of one operation on one weight."""

    path: str
    operation: str
    where: str
    present: frozenset[int]
    """The axes of the base weight that its view still has here."""
    meeting: Meeting | None = None
    refusal: NotLowRank | None = None
    """Why W + ΔW is formed here, where it is."""


@dataclass(frozen=True)
class Walk:
    """One run over a jaxpr."""

    notes: dict[Hashable, Note] | None = None
    """By leaf path, equation and view, because JAX may trace a loop body more than once; None
    where nobody will read them."""
    dropout_key: jax.Array | None = None
    """Of this place in the program; None where nothing is dropped."""
    second_factors: set[tuple[int, tuple[int, ...]]] | None = None
    """Inside a remat: operand number and shape of the factors that meet the rank-sized product."""
    inside: str = ""
    """Where the enclosing equation stands, for inner ones that JAX keeps no place of."""

    def within(self, eqn: JaxprEqn) -> "Walk":
        """The walk inside an equation that has an inner function."""
        return self if self.notes is None else replace(self, inside=where(eqn) or self.inside)

    def at(self, place: Any) -> "Walk":
        """The walk at one equation or one step of a loop, with a dropout key of its own."""
        if self.dropout_key is None:
            return self
        return replace(self, dropout_key=jax.random.fold_in(self.dropout_key, place))

    def remember_second_factor(self, operand: int, shape: tuple[int, ...]) -> None:
        """Tell an enclosing remat that products whose operand has this shape are ours."""
        if self.second_factors is not None:
            self.second_factors.add((operand, shape))

    def dropped(self, x: Any, weight: Weight) -> Any:
        """A's input under dropout: entries are zero at the site's rate, the rest scaled up."""
        rate = weight.site.dropout
        if self.dropout_key is None or rate == 0:
            return x
        key = path_key(self.dropout_key, weight.site.path)
        if shards := tuple(sorted(varying(x))):
            key = jax.random.fold_in(key, lax.axis_index(shards))
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

    def function(self, jaxpr: Jaxpr | ClosedJaxpr) -> Callable[..., list[Any]]:
        """The jaxpr as a function from its inputs, weights or arrays, to a list of outputs."""
        consts = getattr(jaxpr, "consts", ())
        inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
        return lambda *inputs: self._run(inner, consts, inputs)

    def plain_function(self, jaxpr: Jaxpr | ClosedJaxpr, eqn: JaxprEqn) -> Callable[..., list[Any]]:
        """As `function`, with every output an array."""
        run = self.function(jaxpr)
        leaves = NotLowRank("leaves a loop, branch or shard_map")
        return lambda *inputs: [self.plain(x, eqn, leaves) for x in run(*inputs)]

    def bind(self, eqn: JaxprEqn, *values: Any) -> list[Any]:
        """The equation itself, on plain values."""
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return list(results) if eqn.primitive.multiple_results else [results]

    def value(self, x: Any) -> Any:
        """The base value behind a weight; anything else as it is."""
        return x.value if isinstance(x, Weight) else x

    def plain(self, x: Any, eqn: JaxprEqn, refusal: NotLowRank) -> Any:
        """``x`` as an array: a weight becomes W + ΔW at this place, with a note of why."""
        if not isinstance(x, Weight):
            return x
        self.note(x, eqn, refusal=refusal)
        return effective_value(x)

    def note(
        self,
        weight: Weight,
        eqn: JaxprEqn,
        meeting: Meeting | None = None,
        refusal: NotLowRank | None = None,
    ) -> None:
        """Remember that ``eqn`` uses ``weight``; what was seen last of an equation holds."""
        if self.notes is None:
            return
        seen = eqn.primitive.name, where(eqn) or self.inside
        for note in _notes(weight, *seen, meeting, refusal):
            key = note.path, id(eqn), weight.axes
            if key in self.notes and self.notes[key].refusal and refusal is None:
                continue  # One equation may use the same view twice: what is merged must stay told.
            self.notes[key] = note

    def returned(self, x: Any, name: str) -> Any:
        """An output of the whole function as an array, with a note where it is a weight."""
        if not isinstance(x, Weight):
            return x
        if self.notes is not None:
            refusal = NotLowRank("is returned by the function")
            notes = _notes(x, "return", name, None, refusal)
            self.notes.update({(note.path, name): note for note in notes})
        return effective_value(x)

    def _run(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for place, eqn in enumerate(jaxpr.eqns):
            with as_from(eqn):
                outputs = self._step(eqn, place, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: JaxprEqn, place: int, inputs: list[Any]) -> Sequence[Any]:
        if not any(isinstance(x, Weight) for x in inputs):
            return self.bind(eqn, *inputs)
        try:
            return _rule_for(eqn)(self.at(place).within(eqn), eqn, *inputs)
        except NotLowRank as refusal:
            if isinstance(refusal, RolesContradict) and self.notes is None:
                raise _contradiction(eqn, inputs, refusal) from None
            return self.bind(eqn, *(self.plain(x, eqn, refusal) for x in inputs))


def _contradiction(eqn: JaxprEqn, inputs: Sequence[Any], refusal: NotLowRank) -> InputError:
    """Planning would have refused it: the plan was made for another function, or without one."""
    sites = [x.site for x in inputs if isinstance(x, Weight)]
    roles = "; ".join(f"{site.path!r} has axis roles {' '.join(site.roles)}" for site in sites)
    return InputError(
        f"the plan does not fit the function: {roles}, but {eqn.primitive.name} at {where(eqn)} "
        f"{refusal}: plan with this function, or declare the roles that it uses"
    )


def _rule_for(eqn: JaxprEqn) -> Callable[..., Sequence[Any]]:
    if eqn.primitive.name not in RULES:
        raise NotLowRank(f"{eqn.primitive.name} has no low-rank rule")
    return RULES[eqn.primitive.name]


def _notes(
    weight: Weight, operation: str, place: str, meeting: Meeting | None, refusal: NotLowRank | None
) -> Iterator[Note]:
    """One note for each leaf that is in the weight."""
    present = frozenset().union(*(axis.base for axis in weight.axes))
    for path in (weight.site.path, *weight.others):
        own = meeting and Meeting(*(_axes_of(path, axes) for axes in meeting))
        yield Note(path, operation, place, _axes_of(path, present), own, refusal)


def _axes_of(path: str, axes: frozenset[tuple[str, int]]) -> frozenset[int]:
    return frozenset(axis for leaf, axis in axes if leaf == path)


class Traced(NamedTuple):
    """A function of parameters as a jaxpr over named leaves."""

    jaxpr: ClosedJaxpr
    paths: tuple[str, ...]
    """The jaxpr's first inputs, in their order."""
    leaves: dict[str, Any]
    """The array leaves of the parameter tree by path, in any order."""
    others: list[Any]
    """The array leaves of the other arguments: the rest of its inputs."""
    output_tree: Any
    output_names: tuple[str, ...]
    """Of the outputs that are arrays."""
    static_outputs: dict[int, Any]
    """The others, by their place among all."""

    def run(self, walk: Walk, weights: Mapping[str, Weight]) -> Any:
        """The function's output, with the given leaves replaced by symbolic weights."""
        inputs = [weights.get(path, self.leaves[path]) for path in self.paths]
        outputs = walk.function(self.jaxpr)(*inputs, *self.others)
        arrays = map(walk.returned, outputs, self.output_names)
        count = len(self.output_names) + len(self.static_outputs)
        static = self.static_outputs
        every = [static[place] if place in static else next(arrays) for place in range(count)]
        return jax.tree.unflatten(self.output_tree, every)


def trace(function: Callable[..., Any], params: Any, args: tuple, kwargs: dict) -> Traced:
    """Trace ``function(params, *args, **kwargs)`` on shapes.

    Leaves without a shape and dtype (flags, strings, Python numbers) are static: the function
    sees them as they are, and gives them back as it does without being traced.
    """
    leaves, tree = jax.tree.flatten((params, args, kwargs))
    dynamic = [index for index, leaf in enumerate(leaves) if _is_array(leaf)]
    output_structures = []

    def on_arrays(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for index, array in zip(dynamic, arrays, strict=True):
            filled[index] = array
        new_params, new_args, new_kwargs = jax.tree.unflatten(tree, filled)
        returned = function(new_params, *new_args, **new_kwargs)
        outputs, output_tree = tree_flatten_with_path(returned)
        names = tuple(f"output{keystr(key)}" for key, leaf in outputs if _is_array(leaf))
        static = {place: leaf for place, (_, leaf) in enumerate(outputs) if not _is_array(leaf)}
        output_structures.append((output_tree, names, static))
        return [leaf for _, leaf in outputs if _is_array(leaf)]

    arrays = [leaves[index] for index in dynamic]
    jaxpr = jax.make_jaxpr(on_arrays)(*arrays)
    named = {path: leaf for path, leaf in named_leaves(params).items() if _is_array(leaf)}
    return Traced(jaxpr, tuple(named), named, arrays[len(named) :], *output_structures[-1])


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
