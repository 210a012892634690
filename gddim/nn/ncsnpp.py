"""NCSN++ / DDPM++: the U-Net of Song et al. (2021, arXiv 2011.13456), as gDDIM (arXiv 2206.05564) trained it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Key, PyTree

from gddim.errors import UserError
from gddim.nn.layers import (
    Attention,
    Conv,
    Dense,
    Draw,
    GroupNorm,
    downsample,
    downsample_conv,
    fourier_embedding,
    refuse_cond,
    sinusoidal_embedding,
    upsample,
)
from gddim.settings import MAY_CHANGE, MAY_CHANGE_AFTER

T = TypeVar("T")


@dataclass(frozen=True)
class NCSNppConfig:
    """An NCSN++ network; the defaults are the one of gDDIM's best CIFAR-10 result."""

    width: int = 128
    """Channels of the finest level; a multiple of 4 up to 128, of 32 beyond."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level over `width`; each level has half the size of the one before."""
    blocks: int = 8
    """Residual blocks a level on the way down (one more on the way up)."""
    attention: tuple[int, ...] = (16,)
    """Image heights at which the levels attend; the coarsest middle block always does."""
    dropout: float = field(default=0.1, metadata=MAY_CHANGE_AFTER)
    """Share of activations dropped in each residual block while training."""
    embedding: Literal["fourier", "positional"] = "fourier"
    """Of the noise level: random Fourier features of its logarithm, which is for times alone, or sinusoids."""
    fir: bool = True
    """Resample with the filter (1, 3, 3, 1) instead of nearest neighbour and mean."""
    progressive_input: Literal["residual", "none"] = "residual"
    """Whether a downsampled copy of the input enters every level."""
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=MAY_CHANGE_AFTER)
    """Type of the computation; parameters, statistics, softmax and output stay float32."""
    remat: bool = field(default=False, metadata=MAY_CHANGE)
    """Recompute the blocks in the backward pass instead of storing their insides."""
    scan_blocks: bool = field(default=False, metadata=MAY_CHANGE)
    """Compile identical consecutive blocks once, as a loop: faster compilation, slower steps; very slow on a CPU."""

    def __post_init__(self) -> None:
        if self.width < 4:
            raise UserError(f"width: got {self.width}, needs at least 4 channels")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers: got {self.multipliers}, needs one positive number a level")
        if self.blocks < 1:
            raise UserError(f"blocks: got {self.blocks}, needs at least 1 a level")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: got {self.dropout}, needs 0 <= dropout < 1")
        for name, accepted in {
            "embedding": ("fourier", "positional"),
            "progressive_input": ("residual", "none"),
            "dtype": ("float32", "bfloat16"),
        }.items():
            if getattr(self, name) not in accepted:
                raise UserError(f"{name}: got {getattr(self, name)!r}, accepted are {', '.join(accepted)}")

    def build(self, in_shape: tuple[int, ...], out_channels: int, key: Key[Array, ""]) -> "NCSNpp":
        """An `NCSNpp` with fresh parameters, from images `in_shape` = `(H, W, C_in)` to `(H, W, out_channels)`."""
        return NCSNpp(self, in_shape, out_channels, key=key)


class Block(eqx.Module):
    """BigGAN's residual block, which resamples inside, and attention after it where asked.

    `h = conv(dropout(swish(norm(conv(resample(swish(norm(x)))) + dense(time)))))`, then
    `(shortcut(resample(x)) + h) / √2`.
    """

    norm_in: GroupNorm
    conv_in: Conv
    time: Dense
    norm_out: GroupNorm
    conv_out: Conv
    shortcut: Conv | None
    attention: Attention | None
    resample: Literal["none", "down", "up"] = eqx.field(static=True)
    fir: bool = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: NCSNppConfig,
        *,
        draw: Draw,
        attend: bool = False,
        resample: Literal["none", "down", "up"] = "none",
    ):
        self.norm_in = GroupNorm(inputs)
        self.conv_in = Conv(inputs, outputs, draw=draw)
        self.time = Dense(4 * config.width, outputs, draw=draw)
        self.norm_out = GroupNorm(outputs)
        self.conv_out = Conv(outputs, outputs, scale=0.0, draw=draw)
        self.shortcut = Conv(inputs, outputs, 1, draw=draw) if inputs != outputs or resample != "none" else None
        self.attention = Attention(outputs, draw=draw) if attend else None
        self.resample, self.fir, self.dropout = resample, config.fir, config.dropout

    @property
    def count(self) -> int:
        """The number of blocks that are stacked in a run."""
        return self.conv_out.bias.shape[0]

    def __call__(
        self, x: Float[Array, "h w i"], time: Float[Array, " t"], keep: Bool[Array, "a b o"] | None = None
    ) -> Float[Array, "a b o"]:
        h = self.norm_in(x, swish=True)
        if self.resample != "none":
            resample = downsample if self.resample == "down" else upsample
            h, x = resample(h, self.fir), resample(x, self.fir)
        h = self.conv_in(h) + self.time(time)[None, None]
        h = self.norm_out(h, swish=True)
        if keep is not None:
            h = jnp.where(keep, h / (1 - self.dropout), 0)
        h = self.conv_out(h)
        x = (h + (x if self.shortcut is None else self.shortcut(x))) * math.sqrt(0.5)
        return x if self.attention is None else self.attention(x)


class Level(eqx.Module):
    """The blocks of one resolution, then what leads to the next: a resampling block, downwards also the input.

    Consecutive blocks of equal shapes are one `Block` with their parameters stacked, `(n, …)`: a third of the arrays for
    the compiler, the optimizer and the collectives.
    """

    runs: list[Block]
    resample: Block | None
    progressive: Conv | None


class NCSNpp(eqx.Module):
    """The U-Net: `net(x, level)` of one image and its noise level.

    `config`: an `NCSNppConfig`.
    `in_shape`, `out_channels`: of the images, `(H, W, C_in)`, and of what it returns, `(H, W, out_channels)`.
    `key`: of the parameters.

    Raises `UserError` for images that cannot be halved as often as there are levels.

    >>> config = NCSNppConfig(width=16, multipliers=(1, 2), blocks=1)
    >>> net = NCSNpp(config, (16, 16, 3), out_channels=3, key=jax.random.key(0))
    >>> net(jnp.zeros((16, 16, 3)), 500.0).shape
    (16, 16, 3)
    """

    frequencies: Float[Array, " width"] | None
    time: tuple[Dense, Dense]
    conv_in: Conv
    down: list[Level]
    middle: list[Block]
    up: list[Level]
    norm_out: GroupNorm
    conv_out: Conv
    config: NCSNppConfig = eqx.field(static=True)
    in_shape: tuple[int, ...] = eqx.field(static=True)
    logarithmic: bool = eqx.field(static=True)  # takes the logarithm of the level, which must then be positive

    def __init__(self, config: NCSNppConfig, in_shape: tuple[int, ...], out_channels: int, *, key: Key[Array, ""]):
        if len(in_shape) != 3:
            raise UserError(f"an NCSN++ takes images (H, W, C), not records of {len(in_shape)} axes")
        height, width, channels = in_shape
        factor = 2 ** (len(config.multipliers) - 1)
        if min(height, width) < 1 or height % factor or width % factor:
            raise UserError(
                f"multipliers: {len(config.multipliers)} levels halve the image {factor.bit_length() - 1} times, "
                f"so its sides must be multiples of {factor}; got {height}x{width}"
            )

        draw = Draw(key)

        def block(inputs: int, outputs: int, **kwargs: Any) -> Block:
            return Block(inputs, outputs, config, draw=draw, **kwargs)

        fourier = config.embedding == "fourier"
        features = config.width * (2 if fourier else 1)
        self.frequencies = 16 * math.sqrt(2) * jax.lax.erf_inv(draw.uniform((config.width,))) if fourier else None
        self.time = (
            Dense(features, 4 * config.width, draw=draw),
            Dense(4 * config.width, 4 * config.width, draw=draw),
        )
        self.conv_in = Conv(channels, config.width, draw=draw)

        sizes = [height // 2**level for level in range(len(config.multipliers))]
        levels = list(enumerate(zip(sizes, (config.width * m for m in config.multipliers), strict=True)))
        last = len(levels) - 1
        skips, pyramid, now = [config.width], channels, config.width
        self.down = []
        for level, (size, outputs) in levels:
            blocks = []
            for _ in range(config.blocks):
                blocks.append(block(now, outputs, attend=size in config.attention))
                skips.append(now := outputs)
            resample = progressive = None
            if level != last:
                resample = block(now, now, resample="down")
                skips.append(now)
                if config.progressive_input == "residual":
                    progressive = Conv(pyramid, now, draw=draw)
                    pyramid = now
            self.down.append(Level(stack_runs(blocks), resample, progressive))
        self.middle = [block(now, now, attend=True), block(now, now)]
        self.up = []
        for level, (size, outputs) in reversed(levels):
            blocks = []
            for i in range(config.blocks + 1):
                attend = i == config.blocks and size in config.attention
                blocks.append(block(now + skips.pop(), outputs, attend=attend))
                now = outputs
            self.up.append(Level(stack_runs(blocks), block(now, now, resample="up") if level else None, None))
        self.norm_out = GroupNorm(now)
        self.conv_out = Conv(now, out_channels, scale=0.0, draw=draw)
        self.config, self.in_shape, self.logarithmic = config, in_shape, fourier

    def __call__(
        self,
        x: Float[Array, "h w i"],
        level: Float[ArrayLike, ""],
        cond: PyTree = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "h w o"]:
        """`x` `(H, W, C_in)` at a level to float32 `(H, W, C_out)`; dropout acts if a key is given."""
        refuse_cond(self, cond)
        if x.shape != self.in_shape:
            raise ValueError(f"x: got shape {x.shape}, the network was built for {self.in_shape}")
        time = self._embed(level)
        masks = iter(self._masks(key) if key is not None and self.config.dropout else ())
        apply = jax.checkpoint(_apply) if self.config.remat else _apply

        def single(block: Block, h: Array) -> Array:
            return apply(h, time, block, None, next(masks, None))

        def through(run: Block, h: Array, skips: Sequence[Array] = ()) -> tuple[Array, list[Array]]:
            """A run of blocks one after another; returns the last output and all of them."""

            def step(h: Array, link: tuple[Block, Array | None, Array | None]) -> tuple[Array, Array]:
                h = apply(h, time, *link)
                return h, h

            links = (run, jnp.stack(skips) if skips else None, next(masks, None))
            if self.config.scan_blocks and run.count > 1:
                h, stacked = jax.lax.scan(step, h, links)
                return h, list(stacked)
            outputs = [h := apply(h, time, *link) for link in unstack(links, run.count)]
            return h, outputs

        h = pyramid = x.astype(self.config.dtype)
        h = self.conv_in(h)
        skips = [h]
        for stage in self.down:
            for run in stage.runs:
                h, outputs = through(run, h)
                skips += outputs
            if stage.resample is not None:
                h = single(stage.resample, h)
                if stage.progressive is not None:
                    h = pyramid = (downsample_conv(pyramid, stage.progressive, self.config.fir) + h) * math.sqrt(0.5)
                skips.append(h)
        for block in self.middle:
            h = single(block, h)
        for stage in self.up:
            for run in stage.runs:
                h, _ = through(run, h, [skips.pop() for _ in range(run.count)])
            if stage.resample is not None:
                h = single(stage.resample, h)
        return self.conv_out(self.norm_out(h.astype(jnp.float32), swish=True))

    def _embed(self, level: Float[ArrayLike, ""]) -> Float[Array, " features"]:
        """The level's features as every block takes them, swish included."""
        level = jnp.asarray(level, jnp.float32)
        if self.frequencies is None:
            features = sinusoidal_embedding(level, self.config.width)
        else:
            features = fourier_embedding(level, self.frequencies)
        for dense in self.time:
            features = jax.nn.swish(dense(features))
        return features.astype(self.config.dtype)

    def _masks(self, key: Key[Array, ""]) -> list[Bool[Array, "*n a b o"]]:
        """What dropout keeps in each run or block, in the order of their calls: 16 random bits a value, all in one draw.

        A draw for each block would take most of the time of compiling a training step.
        """
        height, width, _ = self.in_shape
        calls: list[tuple[int, Block | None]] = []  # each run or block with the level of its output
        for i, level in enumerate(self.down):
            calls += [*((i, run) for run in level.runs), (i + 1, level.resample)]
        calls += [(len(self.down) - 1, block) for block in self.middle]
        for i, level in zip(reversed(range(len(self.up))), self.up, strict=True):
            calls += [*((i, run) for run in level.runs), (i - 1, level.resample)]
        biases = [(i, block.conv_out.bias.shape) for i, block in calls if block is not None]
        shapes = [(*shape[:-1], height >> i, width >> i, shape[-1]) for i, shape in biases]
        ends = list(itertools.accumulate(math.prod(shape) // self.config.width for shape in shapes))
        # Rows as wide as the finest level, lower halves before upper ones: a TPU pads a last axis of 2 to 128.
        words = jax.random.bits(key, (-(-ends[-1] // 2), self.config.width), jnp.uint32)
        threshold = min(round(self.config.dropout * 2**16), 2**16 - 1)
        keep = jnp.concatenate([(words & 0xFFFF) >= threshold, (words >> 16) >= threshold])
        keep = jax.lax.optimization_barrier(keep)
        starts = [0, *ends[:-1]]
        return [keep[a:b].reshape(shape) for shape, a, b in zip(shapes, starts, ends, strict=True)]


@jax.jit  # traced once for all blocks of equal shapes
def _apply(h: Array, time: Array, block: Block, skip: Array | None, keep: Array | None) -> Array:
    return block(h if skip is None else jnp.concatenate([h, skip], axis=-1), time, keep)


def stack_runs(blocks: Sequence[Block]) -> list[Block]:
    """Consecutive blocks of equal shapes as one, their parameters stacked."""

    def shapes(block: Block) -> tuple[Any, list[tuple[int, ...]]]:
        leaves, structure = jax.tree.flatten(block)
        return structure, [leaf.shape for leaf in leaves]

    def stack(*leaves: Array) -> Array:  # NumPy compiles nothing
        return jnp.stack(leaves) if any(isinstance(leaf, Tracer) for leaf in leaves) else jnp.asarray(np.stack(leaves))

    return [jax.tree.map(stack, *run) for _, run in itertools.groupby(blocks, shapes)]


def unstack(tree: T, count: int) -> list[T]:
    """The `count` trees whose arrays are stacked in one."""
    leaves, structure = jax.tree.flatten(tree)
    columns = [jnp.unstack(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, [column[i] for column in columns]) for i in range(count)]
