"""The values that say how one weight is adapted (``Site``) and which weights are (``Plan``)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Role = Literal["stack", "in", "out"]
ROLES: tuple[Role, ...] = ("stack", "in", "out")
INITIALISERS = ("kaiming_uniform", "gaussian")
VARIANTS = ("lora", "dora", "full", "rows", "bias")


class Use(NamedTuple):
    """One operation of the model function that reads an adapted weight."""

    operation: str
    """Name of the JAX primitive, such as ``dot_general``."""
    where: str
    """The line of the user's source that called it."""
    merged_because: str = ""
    """Empty where the low-rank products are used; else why W + ΔW is formed at this place."""


@dataclass(frozen=True)
class Site:
    """How one weight is adapted: ΔW = scale · A B in the weight's own axes.

    ``roles`` names each axis of the weight: ``stack`` (layers of a scan, experts), ``in``
    (contracted with the input) or ``out``. A has shape ``(*stack, *in, rank)`` and B has
    shape ``(*stack, rank, *out)``.

    >>> site = Site("q_proj/kernel", (30, 576, 192), "float32", ("stack", "in", "out"), 16, 2.0)
    >>> site.a_shape, site.b_shape
    ((30, 576, 16), (30, 16, 192))
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    roles: tuple[Role, ...]
    rank: int
    """The largest along the stack; 0 where there are no factors."""
    scale: float | tuple[float, ...]
    """One number, or one for each index of the first stack axis."""
    ranks: tuple[int, ...] = ()
    """Of each index of the first stack axis, where they differ; A and B are zero beyond them."""
    variant: str = "lora"
    """``lora``; ``dora``; ``full`` (trained whole); ``rows`` (some rows are trained); ``bias`` (an
    update of a bias, added to it)."""
    rows: tuple[int, ...] = ()
    """Of ``rows``: which indices of the first axis are trained."""
    init: str = "kaiming_uniform"
    init_std: float | None = None
    dropout: float = 0.0
    """Share of the entries of A's input that training drops."""
    uses: tuple[Use, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether another leaf takes this one's place: it has neither roles nor factors."""
        return self.variant in ("full", "bias")

    def axes(self, role: Role) -> tuple[int, ...]:
        """The axes of the weight that play ``role``, in order."""
        return tuple(axis for axis, its_role in enumerate(self.roles) if its_role == role)

    def dims(self, role: Role) -> tuple[int, ...]:
        """The sizes of the axes that play ``role``, in order."""
        return tuple(self.shape[axis] for axis in self.axes(role))

    @property
    def fan_in(self) -> int:
        """How many input features are contracted."""
        return math.prod(self.dims("in"))

    @property
    def fan_out(self) -> int:
        """How many output features there are."""
        return math.prod(self.dims("out"))

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of A: ``(*stack, *in, rank)``."""
        return (*self.dims("stack"), *self.dims("in"), self.rank)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of B: ``(*stack, rank, *out)``."""
        return (*self.dims("stack"), self.rank, *self.dims("out"))

    @property
    def m_shape(self) -> tuple[int, ...]:
        """Shape of DoRA's magnitude: ``(*stack, *out)``."""
        return (*self.dims("stack"), *self.dims("out"))

    @property
    def entry_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the adapter's entry, by its name."""
        return {
            "lora": {"a": self.a_shape, "b": self.b_shape},
            "dora": {"a": self.a_shape, "b": self.b_shape, "m": self.m_shape},
            "full": {"value": self.shape},
            "rows": {"rows": (len(self.rows), *self.shape[1:])},
            "bias": {"bias": self.shape},
        }[self.variant]

    @property
    def trainable(self) -> int:
        """How many parameters are trained; zeros that fill up unequal ranks don't count."""
        arrays = sum(math.prod(shape) for shape in self.entry_shapes.values())
        if not self.ranks:
            return arrays
        filled = sum(self.rank - rank for rank in self.ranks)
        return arrays - filled * math.prod(self.dims("stack")[1:]) * (self.fan_in + self.fan_out)


@dataclass(frozen=True, eq=True)
class Plan(Mapping[str, Site]):
    """Every adapted weight by its path: frozen, hashable, made by ``plan``.

    >>> site = Site("w", (4, 6), "float32", ("in", "out"), rank=2, scale=1.0)
    >>> plan = Plan((site,), base_parameters=24)
    >>> plan["w"].rank, list(plan), plan.trainable
    (2, ['w'], 20)
    """

    sites: tuple[Site, ...]
    base_parameters: int
    """Parameters of the whole base tree, adapted or not."""

    @cached_property
    def _by_path(self) -> dict[str, Site]:
        return {site.path: site for site in self.sites}

    def __getitem__(self, path: str) -> Site:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return (site.path for site in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def trainable(self) -> int:
        """How many parameters the adapter trains."""
        return sum(site.trainable for site in self.sites)

    @property
    def all_parameters(self) -> int:
        """Base and adapter together, as PEFT counts them: a weight trained whole counts twice."""
        return self.base_parameters + self.trainable
