"""Small trees of every kind of module, and adapters of torch modules that fit them."""

import jax.numpy as jnp
import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, RowAdapter
from interop.conversion import to_torch
from interop.keymaps import Keymap, Rule
from lora_jax.merging import merge

TABLE = Keymap(
    (
        Rule("embed/table", "embed.weight", (), "embedding"),
        Rule("h/fc/kernel", "h.{i}.fc.weight", (1, 0), "linear"),
        Rule("h/fc/bias", "h.{i}.fc.bias"),
        Rule("moe/gate_up", "h.{i}.experts.{e}.gate.weight", (1, 0), "linear", (0, 2)),
        Rule("moe/gate_up", "h.{i}.experts.{e}.up.weight", (1, 0), "linear", (1, 2)),
        Rule("conv_{i}/kernel", "convs.{i}.weight", (3, 2, 0, 1), "conv"),
        Rule("head/weight", "head.weight", (), "linear"),
        Rule("q/kernel", "h.{i}.q.weight", ((1, 2), 0), "linear"),
        Rule("o/kernel", "h.{i}.o.weight", (2, (0, 1)), "linear"),
        Rule("c/kernel", "c.weight", (), "linear_in_out"),
        Rule("down", "h.{i}.mlp.down", (0, 2, 1), "parameter"),
        Rule("up", "h.{i}.mlp.up", (), "parameter_in_out"),
        Rule("flat", "mlp.flat", (), "parameter"),
    ),
    copies={"head.weight": "embed.weight"},
)
SHAPES = {
    "embed": {"table": (11, 4)},
    "h": {"fc": {"kernel": (3, 4, 6), "bias": (3, 6)}},
    "moe": {"gate_up": (2, 3, 4, 10)},
    "conv_0": {"kernel": (3, 2, 4, 5)},
    "conv_1": {"kernel": (1, 1, 5, 2)},
    "head": {"weight": (11, 4)},
    "q": {"kernel": (2, 4, 3, 2)},
    "o": {"kernel": (2, 3, 2, 5)},
    "c": {"kernel": (4, 6)},
    "down": (2, 3, 4, 5),
    "up": (2, 3, 4, 5),
    "flat": (6, 4),
}


def params(shapes=SHAPES, seed=0):
    """Random parameters of the given shapes."""
    rng = np.random.default_rng(seed)
    return {
        key: params(inner, seed + 1)
        if isinstance(inner, dict)
        else jnp.asarray(rng.normal(size=inner), jnp.float32)
        for key, inner in shapes.items()
    }


def pair(rank, inputs, out, scale=1.5, kind="linear", dora=False, dtype=np.float32):
    """A module's adapter with random values."""
    rng = np.random.default_rng(rank + out)
    a, b, m = (rng.normal(size=s).astype(dtype) for s in ((rank, *inputs), (out, rank), out))
    return ModuleAdapter(a, b, scale, kind, np.abs(m) if dora else None)


def stacked(rank, out, inputs, scale=1.5):
    """The adapter of three experts' weights in one parameter."""
    each = [pair(rank, (inputs,), out + e) for e in range(3)]
    a, b = np.stack([m.a for m in each]), np.stack([m.b[:out] for m in each])
    return ModuleAdapter(a, b, scale, "experts")


def experts(rank=2, scale=1.0):
    """Gate and up of every expert of every layer."""
    return {
        f"h.{i}.experts.{e}.{part}": pair(rank + (part == "up"), (4,), 5, scale)
        for i, e in np.ndindex(2, 3)
        for part in ("gate", "up")
    }


CASES = {
    "one rank and scale": {"modules": {f"h.{i}.fc": pair(2, (4,), 6) for i in range(3)}},
    "ranks and scales by layer": {
        "modules": {"h.0.fc": pair(3, (4,), 6, 0.5), "h.2.fc": pair(1, (4,), 6, 2.0)}
    },
    "dora": {"modules": {f"h.{i}.fc": pair(2, (4,), 6, dora=True) for i in range(3)}},
    "embedding": {"modules": {"embed": pair(2, (11,), 4, kind="embedding")}},
    "convolutions": {
        "modules": {
            "convs.0": pair(3, (4, 3, 2), 5, kind="conv", dora=True),
            "convs.1": pair(2, (5, 1, 1), 2, kind="conv"),
        }
    },
    "torch's own order": {"modules": {"head": pair(2, (4,), 11, dora=True)}},
    "heads apart": {
        "modules": {
            **{f"h.{i}.q": pair(2 + i, (4,), 6) for i in range(2)},
            **{f"h.{i}.o": pair(2, (6,), 5, dora=True) for i in range(2)},
        }
    },
    "heads apart, dora": {"modules": {f"h.{i}.q": pair(2, (4,), 6, dora=True) for i in range(2)}},
    "in before out": {"modules": {"c": pair(2, (4,), 6, dora=True)}},
    "experts in a parameter": {
        "modules": {
            **{f"h.{i}.mlp.{name}": stacked(2, 5, 4) for i in range(2) for name in ("down", "up")},
            "mlp.flat": pair(2, (4,), 6),
        }
    },
    "parts of fused experts": {"modules": experts()},
    "one part alone": {"modules": {k: v for k, v in experts().items() if k.endswith("up")}},
    "rows": {"rows": {"embed": RowAdapter((7, 2), np.ones((2, 4), np.float32))}},
    "whole": {
        "modules": {"head": pair(2, (4,), 11)},
        "whole": {f"h.{i}.fc.bias": np.full(6, i, np.float32) for i in range(3)},
    },
}


def file_of(case):
    """A case as the content of a file."""
    return FileAdapter("mine", **{"modules": {}, **case})


def merged_by_torch_name(tree, adapter, plan, table=TABLE):
    """What `merge` makes of a tree, by torch's names."""
    return {n: np.asarray(t) for n, t in to_torch(merge(tree, adapter, plan), table).items()}
