"""DiT: the diffusion transformer of Peebles and Xie (2023, arXiv 2212.09748), with normalised queries and keys."""

from dataclasses import dataclass, field
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, ScalarLike

from gddim.errors import UserError
from gddim.nn.layers import Dense, Draw, augment_features, constant, one_hot_label, sinusoidal_embedding
from gddim.settings import LATER, MAY_CHANGE, MAY_CHANGE_AFTER

FREQUENCIES = 256  # features of the noise level


@dataclass(frozen=True)
class DiTConfig:
    """A transformer over patches of an image; the defaults are DiT-S/2."""

    width: int = 384
    """Features of a patch."""
    depth: int = 12
    """Blocks of attention and perceptron."""
    heads: int = 6
    """Heads of attention, which divide the width."""
    patch: int = 2
    """Pixels a side of a patch; 1 for data with little else than positions."""
    classes: int = field(default=0, metadata=LATER)
    """Classes of the data, of which the network is told one as `cond["label"]`; 0: as many as the data have."""
    augment: int = field(default=0, metadata=LATER)
    """Numbers that tell how an image was augmented, `cond["augment"]`; 0: as many as train.augment makes."""
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=MAY_CHANGE_AFTER)
    """Type of the computation; parameters, statistics, softmax and output stay float32."""
    remat: bool = field(default=False, metadata=MAY_CHANGE)
    """Recompute the blocks in the backward pass instead of storing their insides."""
    scan_blocks: bool = field(default=True, metadata=MAY_CHANGE)
    """Compile the block once, as a loop; unrolled it compiles longer."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, needs at least 1")
        for name in ("classes", "augment"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: got {getattr(self, name)}, needs at least 0")
        if self.width % 4 or self.width % self.heads:
            raise UserError(f"width: got {self.width}, needs a multiple of 4 and of the {self.heads} heads")
        if self.dtype not in (accepted := ("float32", "bfloat16")):
            raise UserError(f"dtype: got {self.dtype!r}, accepted are {', '.join(accepted)}")

    def build(self, in_shape: tuple[int, ...], out_channels: int, key: PRNGKeyArray) -> "DiT":
        """A `DiT` with fresh parameters, from images `in_shape` = `(H, W, C_in)` to `(H, W, out_channels)`."""
        return DiT(self, in_shape, out_channels, key=key)


class Block(eqx.Module):
    """Attention and perceptron, each `x + gate · f(scale · norm(x) + shift)`, modulated by level and class from zero on."""

    modulation: Dense
    query_key_value: Dense
    query_scale: Float[Array, " d"]
    key_scale: Float[Array, " d"]
    out: Dense
    inner: Dense
    outer: Dense

    def __init__(self, config: DiTConfig, draw: Draw):
        width, head = config.width, config.width // config.heads
        self.modulation = Dense(width, 6 * width, scale=0.0, draw=draw)
        self.query_key_value = Dense(width, 3 * width, draw=draw)
        self.query_scale, self.key_scale = constant(1.0, head), constant(1.0, head)
        self.out = Dense(width, width, draw=draw)
        self.inner, self.outer = Dense(width, 4 * width, draw=draw), Dense(4 * width, width, draw=draw)

    def __call__(self, x: Float[Array, "n w"], time: Float[Array, " w"]) -> Float[Array, "n w"]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.split(self.modulation(time)[None], 6, axis=-1)
        x = x + gate * self.out(self._attend(modulated(x, shift, scale)))
        h = self.outer(jax.nn.gelu(self.inner(modulated(x, shift_mlp, scale_mlp))))
        return x + gate_mlp * h

    def _attend(self, x: Float[Array, "n w"]) -> Float[Array, "n w"]:
        head = self.query_scale.shape[-1]
        q, k, v = (each.reshape(1, len(x), -1, head) for each in jnp.split(self.query_key_value(x), 3, axis=-1))
        with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 and float32 inside
            h = jax.nn.dot_product_attention(_rms(q, self.query_scale), _rms(k, self.key_scale), v)
        return h.reshape(x.shape)


class DiT(eqx.Module):
    """The transformer: `net(x, level)` of one image and its noise level.

    `config`: a `DiTConfig`.
    `in_shape`, `out_channels`: of the images, `(H, W, C_in)`, and of what it returns, `(H, W, out_channels)`.
    `key`: of the parameters.

    Raises `UserError` for images that patches do not tile.

    >>> net = DiT(DiTConfig(width=16, depth=2, heads=2), (8, 8, 3), out_channels=3, key=jax.random.key(0))
    >>> net(jnp.zeros((8, 8, 3)), 0.5).shape
    (8, 8, 3)
    """

    first: Dense
    time: tuple[Dense, Dense]
    label: Dense | None
    augment: Float[Array, "n w"] | None
    blocks: Block
    """All of them, their parameters stacked."""
    modulation: Dense
    last: Dense
    config: DiTConfig = eqx.field(static=True)
    in_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, config: DiTConfig, in_shape: tuple[int, ...], out_channels: int, *, key: PRNGKeyArray):
        if len(in_shape) != 3:
            raise UserError(f"a DiT takes images (H, W, C), not records of {len(in_shape)} axes")
        height, width, channels = in_shape
        if height % config.patch or width % config.patch:
            raise UserError(f"patch: {config.patch} does not divide the sides of the image, {height}x{width}")
        draw, tile = Draw(key), config.patch**2
        self.first = Dense(tile * channels, config.width, draw=draw)
        self.time = Dense(FREQUENCIES, config.width, draw=draw), Dense(config.width, config.width, draw=draw)
        self.label = Dense(config.classes, config.width, draw=draw) if config.classes else None
        blocks = [Block(config, draw) for _ in range(config.depth)]
        self.blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        self.modulation = Dense(config.width, 2 * config.width, scale=0.0, draw=draw)
        self.last = Dense(config.width, tile * out_channels, scale=0.0, draw=draw)
        self.augment = draw.kernel((config.augment, config.width)) if config.augment else None
        self.config, self.in_shape = config, in_shape

    def __call__(
        self,
        x: Float[Array, "h w i"],
        level: ScalarLike,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "h w o"]:
        """`x` `(H, W, C_in)` at a level to float32 `(H, W, C_out)`; `key` is as of every network, and nothing is random."""
        label = one_hot_label(self, cond, self.config.classes, self.config.augment)
        if x.shape != self.in_shape:
            raise ValueError(f"x: got shape {x.shape}, the network was built for {self.in_shape}")
        config, (height, width, _), p = self.config, self.in_shape, self.config.patch
        time = sinusoidal_embedding(jnp.asarray(level, jnp.float32), FREQUENCIES)
        time = self.time[1](jax.nn.swish(self.time[0](time)))
        if self.label is not None:
            time = time + self.label(label)
        time = jax.nn.swish(time + augment_features(self.augment, cond)).astype(config.dtype)

        tiles = x.reshape(height // p, p, width // p, p, -1).swapaxes(1, 2)
        h = self.first(tiles.reshape(height * width // p**2, -1).astype(config.dtype))
        h = h + jnp.asarray(positions(height // p, width // p, config.width), h.dtype)
        step = lambda h, block: (block(h, time), None)
        step = jax.checkpoint(step) if config.remat else step
        h, _ = jax.lax.scan(step, h, self.blocks, unroll=1 if config.scan_blocks else config.depth)

        shift, scale = jnp.split(self.modulation(time)[None], 2, axis=-1)
        out = self.last(modulated(h, shift, scale).astype(jnp.float32))
        return out.reshape(height // p, width // p, p, p, -1).swapaxes(1, 2).reshape(height, width, -1)


def modulated(x: Float[Array, "n w"], shift: Float[Array, "1 w"], scale: Float[Array, "1 w"]) -> Float[Array, "n w"]:
    """`(1 + scale) · norm(x) + shift`, layer normalisation with statistics in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
    return normal.astype(x.dtype) * (1 + scale) + shift


def _rms(x: Float[Array, "1 n h d"], scale: Float[Array, " d"]) -> Float[Array, "1 n h d"]:
    """`scale · x/rms(x)`: without it attention in bfloat16 diverges in long trainings."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (normal * scale[None, None, None]).astype(x.dtype)


def positions(height: int, width: int, features: int) -> Float[np.ndarray, "n f"]:
    """Sinusoids of each patch's row and column, half of the features each."""
    rates = 10_000.0 ** -(np.arange(features // 4) / (features / 4))
    rows, columns = (np.outer(np.arange(n), rates) for n in (height, width))
    rows, columns = (np.concatenate([np.sin(angles), np.cos(angles)], -1) for angles in (rows, columns))
    shape = (height, width, features // 2)
    both = [np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)]
    return np.concatenate(both, -1).reshape(-1, features)
