"""The blocks of NCSN++ and of its kin, DDPM and ADM, and runs of equal ones."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from gddim.nn.layers import Attention, Conv, Dense, Draw, GroupNorm, downsample, upsample
from gddim.nn.whole import whole

T = TypeVar("T")


class Style(NamedTuple):
    """In what the published families of U-Nets differ."""

    scale: float
    """Of the sum of a branch and its shortcut."""
    by_conv: bool = False
    """Resample by a convolution between the blocks, not inside a block."""
    centred: bool = False
    """A strided convolution is centred on the upper left of the four pixels that become one, not on the lower right."""
    attend_always: bool = False
    """Attend after every block of an attending level on the way up, not after the last alone."""
    modulate: bool = False
    """The noise level scales and shifts what is normalised, instead of being added before."""


STYLES = {
    "ncsnpp": Style(math.sqrt(0.5)),
    "ddpm": Style(1.0, by_conv=True, attend_always=True),
    "diffusers": Style(1.0, by_conv=True, centred=True, attend_always=True),
    "adm": Style(1.0, attend_always=True, modulate=True),
}


class Block(eqx.Module):
    """A residual block, which resamples inside, and attention after it where asked.

    BigGAN's, as NCSN++ has it, is `h = conv(dropout(swish(norm(conv(resample(swish(norm(x)))) + dense(time)))))`, then
    `(shortcut(resample(x)) + h) / √2`. See `Style` for the others.
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
    style: Style = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: Any,  # an NCSNppConfig
        *,
        draw: Draw,
        attend: bool = False,
        resample: Literal["none", "down", "up"] = "none",
    ):
        style = STYLES[config.style]
        projected = inputs != outputs or (resample != "none" and not style.modulate)
        self.norm_in = config.norm(inputs)
        self.conv_in = Conv(inputs, outputs, draw=draw)
        self.time = Dense(config.hidden_features, outputs * (1 + style.modulate), draw=draw)
        self.norm_out = config.norm(outputs)
        self.conv_out = Conv(outputs, outputs, scale=0.0, draw=draw)
        self.shortcut = Conv(inputs, outputs, 1, draw=draw) if projected else None
        self.attention = None
        if attend and (heads := config.heads(outputs)):
            self.attention = Attention(config.norm(outputs), heads, config.scale, draw=draw)
        self.resample, self.fir, self.dropout, self.style = resample, config.fir, config.dropout, style
        self.scale = config.scale

    @property
    def count(self) -> int:
        """The number of blocks that are stacked in a run."""
        return self.conv_out.bias.shape[0]

    def __call__(
        self, x: Float[Array, "h w i"], time: Float[Array, " t"], keep: Bool[Array, "a b o"] | None = None
    ) -> Float[Array, "a b o"]:
        x = whole(x)
        h = self.norm_in(x, swish=True)
        if self.resample != "none":
            resample = downsample if self.resample == "down" else upsample
            h, x = resample(h, self.fir), resample(x, self.fir)
        h, time = self.conv_in(h), self.time(time)[None, None]
        if self.style.modulate:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = jax.nn.swish(self.norm_out(whole(h)) * (scale + 1) + shift)
        else:
            h = self.norm_out(whole(h + time), swish=True)
        if keep is not None:
            h = jnp.where(keep, h / (1 - self.dropout), 0)
        h = self.conv_out(h)
        x = (h + (x if self.shortcut is None else self.shortcut(x))) * self.scale
        return x if self.attention is None else self.attention(x)


class Level(eqx.Module):
    """The blocks of one resolution, then what leads to the next: a block or a convolution, downwards also the input.

    Consecutive blocks of equal shapes are one `Block` with their parameters stacked, `(n, …)`: a third of the arrays for
    the compiler, the optimizer and the collectives.
    """

    runs: list[Block]
    resample: Block | Conv | None
    progressive: Conv | None


@jax.jit  # traced once for all blocks of equal shapes
def apply_block(h: Array, time: Array, block: Block, skip: Array | None, keep: Array | None) -> Array:
    return block(h if skip is None else jnp.concatenate([h, skip], axis=-1), time, keep)


def stack_runs(blocks: Sequence[Block], joined: Sequence[int] = ()) -> list[Block]:
    """Consecutive blocks of equal shapes as one, their parameters stacked.

    `joined`: of each block's inputs those channels that a skip connection brings, which are as many throughout a run.
    """

    def shapes(pair: tuple[Block, int]) -> tuple[Any, list[tuple[int, ...]], int]:
        leaves, structure = jax.tree.flatten(pair[0])
        return structure, [leaf.shape for leaf in leaves], pair[1]

    def stack(*leaves: Array) -> Array:  # NumPy compiles nothing
        return jnp.stack(leaves) if any(isinstance(leaf, Tracer) for leaf in leaves) else jnp.asarray(np.stack(leaves))

    pairs = zip(blocks, joined or [0] * len(blocks), strict=True)
    return [jax.tree.map(stack, *(block for block, _ in run)) for _, run in itertools.groupby(pairs, shapes)]


def unstack(tree: T, count: int) -> list[T]:
    """The `count` trees whose arrays are stacked in one."""
    leaves, structure = jax.tree.flatten(tree)
    columns = [jnp.unstack(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, [column[i] for column in columns]) for i in range(count)]
