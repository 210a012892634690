"""A residual multilayer perceptron for points, called like the image networks."""

from dataclasses import dataclass

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from gddim.errors import UserError
from gddim.nn.layers import Dense, Draw, initialise, sinusoidal_embedding


@dataclass(frozen=True)
class MLPConfig:
    """A residual MLP with a time embedding."""

    width: int = 128
    """Features of every hidden layer."""
    depth: int = 3
    """Residual layers."""

    def __post_init__(self) -> None:
        if self.width < 4:
            raise UserError(f"width: got {self.width}, needs at least 4 features")
        if self.depth < 1:
            raise UserError(f"depth: got {self.depth}, needs at least 1 layer")

    def build(self, in_shape: tuple[int], out_channels: int, key: Key[Array, ""]) -> "MLP":
        """A network of this configuration with fresh parameters, from `(D,)` to `(out_channels,)`."""
        return initialise(lambda draw: MLP(self, in_shape[0], out_channels, draw=draw), key)


class MLP(eqx.Module):
    """`h ← h + V swish(W h + time)` for every layer; `net(x, t)` of one point `(D,)` and its time label, as 999 t."""

    time: tuple[Dense, Dense]
    first: Dense
    layers: list[tuple[Dense, Dense]]
    last: Dense

    def __init__(self, config: MLPConfig, in_features: int, out_features: int, *, draw: Draw):
        width = config.width
        self.time = Dense(width, width, draw=draw), Dense(width, width, draw=draw)
        self.first = Dense(in_features, width, draw=draw)
        self.layers = [(Dense(width, width, draw=draw), Dense(width, width, draw=draw)) for _ in range(config.depth)]
        self.last = Dense(width, out_features, scale=0.0, draw=draw)

    def __call__(
        self, x: Float[Array, " i"], t: Float[Array, ""], key: Key[Array, ""] | None = None
    ) -> Float[Array, " o"]:
        """`(C_out,)`; `key` is accepted as by every network, though nothing here is random."""
        time = sinusoidal_embedding(t, self.first.bias.size)
        for dense in self.time:
            time = jax.nn.swish(dense(time))
        h = self.first(x)
        for inner, outer in self.layers:
            h = h + outer(jax.nn.swish(inner(h) + time))
        return self.last(jax.nn.swish(h))
