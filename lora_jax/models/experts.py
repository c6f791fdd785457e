"""A mixture of experts in Flax: a router, stacked experts, and the losses that balance them.

The parameters of one block::

    gate/kernel                                       (hidden, experts)
    experts/gate_up_proj                              (experts, hidden, 2 * width)
    experts/down_proj                                 (experts, width, hidden)
    shared_expert/{gate_proj,up_proj,down_proj}/kernel

The expert axis is one that both ways of computing loop over, so that an adapter has an A and a B
for each expert.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lora_jax.models.forms import ExpertsForm

__all__ = ["ExpertsForm", "RoutedMLP", "Routing", "sequence_loss", "switch_loss"]

_normal = nn.initializers.normal(0.02)
_float32_dot = partial(lax.dot_general, preferred_element_type=jnp.float32)

Activation = Callable[[Array], Array]


class Routing(NamedTuple):
    """Where tokens went; the axes before the last are those of the tokens.

    Attributes:
        probabilities: float32 (..., experts), each token's softmax over experts.
        chosen: int32 (..., per_token), its experts, the likeliest first.
    """

    probabilities: Array
    chosen: Array


class RoutedMLP(nn.Module):
    """Σ over a token's experts e of p_e · down_e(activation(gate_e(x)) · up_e(x)).

    >>> form = ExpertsForm(count=4, per_token=2, width=8)
    >>> x = jnp.ones((1, 3, 16))
    >>> block = RoutedMLP(form)
    >>> made = jax.eval_shape(block.init, jax.random.key(0), x)
    >>> made["params"]["experts"]["gate_up_proj"].shape
    (4, 16, 16)
    >>> apply = partial(block.apply, mutable=["routing"])
    >>> y, sown = jax.eval_shape(apply, {"params": made["params"]}, x)
    >>> y.shape, sown["routing"]["router"].chosen.shape
    ((1, 3, 16), (1, 3, 2))

    The `Routing` comes with ``mutable=["routing"]``, for `switch_loss` and `sequence_loss`.

    Source: Shazeer et al., https://arxiv.org/abs/1701.06538; Fedus et al., Switch Transformers,
    https://arxiv.org/abs/2101.03961.
    """

    form: ExpertsForm
    activation: Activation = nn.silu
    dtype: str = "float32"
    products: str = "scan"
    """How experts are computed: a key of `PRODUCTS`."""

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        form, features = self.form, hidden.shape[-1]
        router = _linear(self, "gate", form.count, dot_general=_float32_dot)
        probabilities = jax.nn.softmax(router(hidden).astype(jnp.float32))
        weights, chosen = lax.top_k(probabilities, form.per_token)
        if form.renormalised:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        routing = Routing(probabilities, chosen)
        self.sow("routing", "router", routing, init_fn=lambda: None, reduce_fn=_latest)
        met = Met(chosen.reshape(-1, form.per_token), weights.reshape(-1, form.per_token))
        experts = Experts(form, self.activation, self.dtype, self.products, name="experts")
        mixed = experts(hidden.reshape(-1, features), met).reshape(hidden.shape)
        if not form.shared_width:
            return mixed
        shared = SharedExpert(form, self.activation, self.dtype, name="shared_expert")
        return mixed + shared(hidden)


class Met(NamedTuple):
    """The experts of each token and their weights, int32 and float32 (tokens, per_token)."""

    chosen: Array
    weights: Array


class Experts(nn.Module):
    """The experts' kernels, and their weighted sum over those that each token meets."""

    form: ExpertsForm
    activation: Activation
    dtype: str
    products: str

    @nn.compact
    def __call__(self, tokens: Array, met: Met) -> Array:
        form, features = self.form, tokens.shape[-1]
        shapes = {
            "gate_up_proj": (form.count, features, 2 * form.width),
            "down_proj": (form.count, form.width, features),
        }
        gate_up, down = (
            self.param(name, _normal, shape).astype(self.dtype) for name, shape in shapes.items()
        )
        mixed = PRODUCTS[self.products](tokens, met, gate_up, down, self.activation)
        return mixed.astype(self.dtype)


class SharedExpert(nn.Module):
    """The expert that every token meets."""

    form: ExpertsForm
    activation: Activation
    dtype: str

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        gate = _linear(self, "gate_proj", self.form.shared_width)(hidden)
        up = _linear(self, "up_proj", self.form.shared_width)(hidden)
        return _linear(self, "down_proj", hidden.shape[-1])(self.activation(gate) * up)


def one_after_another(
    tokens: Array, met: Met, gate_up: Array, down: Array, activation: Activation
) -> Array:
    """The mixture by a scan over experts, each over all tokens, float32 (tokens, features).

    A token that an expert doesn't meet goes through it as zeros, so that nothing of it, not even
    an overflow, comes out or back.
    """
    count = gate_up.shape[0]
    places = jax.nn.one_hot(met.chosen, count, axis=0, dtype=jnp.float32)
    weights = jnp.sum(places * met.weights, axis=-1)

    def add(total: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        gate_up, down, meets, weight = expert
        own = jnp.where(meets[:, None], tokens, 0)
        gate, up = jnp.split(own @ gate_up, 2, axis=-1)
        made = (activation(gate) * up) @ down
        return total + weight[:, None] * made.astype(jnp.float32), None

    start = jnp.zeros(tokens.shape, jnp.float32)
    return lax.scan(add, start, (gate_up, down, places.any(axis=-1), weights))[0]


def sorted_by_expert(
    tokens: Array, met: Met, gate_up: Array, down: Array, activation: Activation
) -> Array:
    """The mixture by products over groups of sorted tokens, float32 (tokens, features)."""
    count, per_token = gate_up.shape[0], met.chosen.shape[-1]
    expert = met.chosen.reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=count)
    gate, up = jnp.split(lax.ragged_dot(tokens[order // per_token], gate_up, sizes), 2, axis=-1)
    made = lax.ragged_dot(activation(gate) * up, down, sizes)[jnp.argsort(order)]
    made = made.reshape(*met.chosen.shape, -1).astype(jnp.float32)
    return jnp.sum(made * met.weights[:, :, None], axis=1)


PRODUCTS = {"scan": one_after_another, "ragged": sorted_by_expert}


def switch_loss(routing: Routing, mask: Array | None = None) -> Array:
    """E · Σ over experts of (share of tokens sent there) · (mean probability): Switch's balance.

    It is ``per_token`` where both are uniform. The tokens of all layers count as one set, as in
    Hugging Face's models; ``jax.vmap(switch_loss)(routing).sum()`` takes each layer by itself.

    Args:
        routing: with any axes before the last.
        mask: zero or False for tokens that don't count, broadcastable to the axes of the tokens.

    Returns:
        float32 (); its gradient goes through the probabilities.

    Source: Fedus et al., https://arxiv.org/abs/2101.03961, equations 4 to 6.

    >>> even = Routing(jnp.full((4, 4), 0.25), jnp.arange(4)[:, None])
    >>> float(switch_loss(even))
    1.0
    """
    experts = routing.probabilities.shape[-1]
    sent = _sent(routing)
    counted = jnp.ones(sent.shape[:-1]) if mask is None else jnp.broadcast_to(mask, sent.shape[:-1])
    over = tuple(range(sent.ndim - 1))
    share, likely = (
        jnp.sum(each * counted[..., None], over) / counted.sum()
        for each in (sent, routing.probabilities)
    )
    return experts * jnp.sum(share * likely)


def sequence_loss(routing: Routing) -> Array:
    """The same balance row by row: mean over rows, sum over layers.

    Σ over experts of (times the row's tokens went there · E / (time · per_token)) · (mean
    probability in the row).

    Args:
        routing: with axes (..., batch, time) before the last; those before batch are layers.

    Returns:
        float32 ().

    Source: DeepSeek-AI, https://arxiv.org/abs/2401.06066, equations 12 to 14; what MiniMind calls
    ``seq_aux``.
    """
    experts, per_token = routing.probabilities.shape[-1], routing.chosen.shape[-1]
    load = jnp.mean(_sent(routing), axis=-2) * experts / per_token
    rows = jnp.sum(load * jnp.mean(routing.probabilities, axis=-2), axis=-1)
    return jnp.sum(jnp.mean(rows, axis=-1))


def _sent(routing: Routing) -> Array:
    """float32 (..., experts): 1 for each expert that a token goes to."""
    experts = routing.probabilities.shape[-1]
    return jnp.sum(jax.nn.one_hot(routing.chosen, experts, dtype=jnp.float32), axis=-2)


def _linear(block: RoutedMLP | SharedExpert, name: str, features: int, **options) -> nn.Dense:
    return nn.Dense(
        features, use_bias=False, dtype=block.dtype, kernel_init=_normal, name=name, **options
    )


def _latest(_, new: Routing) -> Routing:
    return new
