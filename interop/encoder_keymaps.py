"""How an encoder's leaf paths and torch names correspond: BERT and RoBERTa, bare and with a head.

Ours is torch's name with the layers as one, and the MLP's two halves gathered::

    layers/mlp/output/dense/kernel (L, in, out)  <->  bert.encoder.layer.{i}.output.dense.weight
"""

from interop.keymaps import Keymap, Kind, Rule, Shape
from lora_jax.errors import InputError
from lora_jax.models.encoder_config import EncoderConfig

# By kind of module: our leaf, torch's parameter, the order of its axes, its kind for adapters.
_LEAVES: dict[str, tuple[tuple[str, str, tuple[int, ...], Kind], ...]] = {
    "embedding": (("embedding", "weight", (), "embedding"),),
    "norm": (("scale", "weight", (), "other"), ("bias", "bias", (), "other")),
    "linear": (("kernel", "weight", (1, 0), "linear"), ("bias", "bias", (), "other")),
}
_BODY = (
    ("embeddings.word_embeddings", "embedding"),
    ("embeddings.position_embeddings", "embedding"),
    ("embeddings.token_type_embeddings", "embedding"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer.{i}.attention.self.query", "linear"),
    ("encoder.layer.{i}.attention.self.key", "linear"),
    ("encoder.layer.{i}.attention.self.value", "linear"),
    ("encoder.layer.{i}.attention.output.dense", "linear"),
    ("encoder.layer.{i}.attention.output.LayerNorm", "norm"),
    ("encoder.layer.{i}.intermediate.dense", "linear"),
    ("encoder.layer.{i}.output.dense", "linear"),
    ("encoder.layer.{i}.output.LayerNorm", "norm"),
    ("pooler.dense", "linear"),
)
_HEADS = {
    "none": (),
    "pooled": (("classifier", "linear"),),
    "dense": (("classifier.dense", "linear"), ("classifier.out_proj", "linear")),
}
_OURS = (
    ("encoder.layer.{i}.attention", "layers.attention"),
    ("encoder.layer.{i}", "layers.mlp"),
    (".", "/"),
)
# Buffers that older versions of transformers saved.
_BUFFERS = (r"(\w+\.)?embeddings\.(position_ids|token_type_ids)",)


def _path(module: str) -> str:
    for theirs, ours in _OURS:
        module = module.replace(theirs, ours)
    return module


def _rules(prefix: str, modules: tuple[tuple[str, str], ...]) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{_path(module)}/{leaf}", f"{prefix}{module}.{suffix}", order, kind)
        for module, made_of in modules
        for leaf, suffix, order, kind in _LEAVES[made_of]
    )


def _table(prefix: str, head: str) -> Keymap:
    return Keymap(_rules(prefix, _BODY) + _rules("", _HEADS[head]), _BUFFERS)


BERT = _table("bert.", "pooled")
ROBERTA = _table("roberta.", "dense")
BARE = _table("", "none")
"""``BertModel`` and ``RobertaModel``, whose names have no prefix."""


def encoder_keymap(config: EncoderConfig) -> Keymap:
    """The table of the class of transformers that computes the same.

    Raises:
      InputError: a head that goes with the other family's positions.
    """
    family = {True: "roberta", False: "bert"}[config.positions_skip_padding]
    tables = {"none": BARE, "pooled": BERT, "dense": ROBERTA}
    known = {("bert", "pooled"), ("roberta", "dense"), ("bert", "none"), ("roberta", "none")}
    if (family, config.head) not in known:
        raise InputError(
            f"head={config.head!r} with positions_skip_padding={config.positions_skip_padding} "
            "has no counterpart in transformers: BERT has the head 'pooled', RoBERTa 'dense'"
        )
    return tables[config.head]


def encoder_shapes(config: EncoderConfig) -> dict[str, Shape]:
    """The shape of every leaf of an encoder, by leaf path.

    >>> config = EncoderConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=3,
    ...                        num_heads=2, max_positions=10)
    >>> encoder_shapes(config)["layers/mlp/intermediate/dense/kernel"]
    (3, 4, 6)
    """
    hidden, wide, labels = config.hidden_size, config.intermediate_size, len(config.labels)
    tables = {
        "word_embeddings": config.vocab_size,
        "position_embeddings": config.max_positions,
        "token_type_embeddings": config.type_vocab_size,
    }
    layers = {
        "attention/self/query": (hidden, hidden),
        "attention/self/key": (hidden, hidden),
        "attention/self/value": (hidden, hidden),
        "attention/output/dense": (hidden, hidden),
        "mlp/intermediate/dense": (hidden, wide),
        "mlp/output/dense": (wide, hidden),
    }
    norms = ("layers/attention/output/LayerNorm", "layers/mlp/output/LayerNorm")
    heads = {
        "none": {},
        "pooled": {"classifier": (hidden, labels)},
        "dense": {"classifier/dense": (hidden, hidden), "classifier/out_proj": (hidden, labels)},
    }
    pooler = {"pooler/dense": (hidden, hidden)} if config.pooler else {}
    stack = (config.num_layers,)
    return {
        **{f"embeddings/{name}/embedding": (rows, hidden) for name, rows in tables.items()},
        **_norm("embeddings/LayerNorm", (hidden,)),
        **_linears({f"layers/{name}": shape for name, shape in layers.items()}, stack),
        **{path: shape for norm in norms for path, shape in _norm(norm, (*stack, hidden)).items()},
        **_linears(pooler | heads[config.head]),
    }


def _norm(name: str, shape: Shape) -> dict[str, Shape]:
    return {f"{name}/scale": shape, f"{name}/bias": shape}


def _linears(modules: dict[str, tuple[int, int]], stack: Shape = ()) -> dict[str, Shape]:
    kernels = {f"{name}/kernel": (*stack, *shape) for name, shape in modules.items()}
    return kernels | {f"{name}/bias": (*stack, shape[1]) for name, shape in modules.items()}
