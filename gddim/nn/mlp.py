"""A residual multilayer perceptron for points, called like the image networks."""

import math
from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, ScalarLike

from gddim.errors import UserError
from gddim.nn.layers import Dense, Draw, one_hot_label, sinusoidal_embedding
from gddim.settings import LATER


@dataclass(frozen=True)
class MLPConfig:
    """A residual MLP with an embedding of the noise level."""

    width: int = 128
    """Features of every hidden layer."""
    depth: int = 3
    """Residual layers."""
    classes: int = field(default=0, metadata=LATER)
    """Classes of the data, of which the network is told one as `cond["label"]`; 0: as many as the data have."""

    def __post_init__(self) -> None:
        if self.width < 4:
            raise UserError(f"width: got {self.width}, needs at least 4 features")
        if self.depth < 1:
            raise UserError(f"depth: got {self.depth}, needs at least 1 layer")
        if self.classes < 0:
            raise UserError(f"classes: got {self.classes}, needs at least 0")

    def build(self, in_shape: tuple[int, ...], out_channels: int, key: PRNGKeyArray) -> "MLP":
        """An `MLP` with fresh parameters, from points `in_shape` = `(D,)` to `(out_channels,)`."""
        return MLP(self, in_shape, out_channels, key=key)


class MLP(eqx.Module):
    """`h ← h + V swish(W h + time)` for every layer: `net(x, level)` of one point and its noise level.

    `config`: an `MLPConfig`.
    `in_shape`, `out_channels`: of the points, `(D,)`, and of what it returns, `(out_channels,)`.
    `key`: of the parameters.

    Raises `UserError` for records that are no points.

    >>> net = MLP(MLPConfig(width=16), (4,), out_channels=2, key=jax.random.key(0))
    >>> net(jnp.zeros(4), 500.0).shape
    (2,)
    """

    time: tuple[Dense, Dense]
    label: Dense | None
    first: Dense
    layers: list[tuple[Dense, Dense]]
    last: Dense

    def __init__(self, config: MLPConfig, in_shape: tuple[int, ...], out_channels: int, *, key: PRNGKeyArray):
        if len(in_shape) != 1:
            raise UserError(f"an MLP takes points (D,), not records of {len(in_shape)} axes")
        width, draw = config.width, Draw(key)
        self.time = Dense(width, width, draw=draw), Dense(width, width, draw=draw)
        self.label = Dense(config.classes, width, draw=draw) if config.classes else None
        self.first = Dense(in_shape[0], width, draw=draw)
        self.layers = [(Dense(width, width, draw=draw), Dense(width, width, draw=draw)) for _ in range(config.depth)]
        self.last = Dense(width, out_channels, scale=0.0, draw=draw)

    def __call__(
        self,
        x: Float[Array, " i"],
        level: ScalarLike,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " o"]:
        """`x` `(D,)` at a level to `(out_channels,)`; `key` is taken as by every network, and nothing is random."""
        classes = 0 if self.label is None else self.label.weight.shape[0]
        label = one_hot_label(self, cond, classes)
        time = sinusoidal_embedding(jnp.asarray(level, jnp.float32), self.first.bias.size)
        if self.label is not None:
            time = time + self.label(label * math.sqrt(classes))  # of variance 1, as the features
        for dense in self.time:
            time = jax.nn.swish(dense(time))
        h = self.first(x)
        for inner, outer in self.layers:
            h = h + outer(jax.nn.swish(inner(h) + time))
        return self.last(jax.nn.swish(h))
