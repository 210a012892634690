"""NCSN++ / DDPM++: the U-Net of Song et al. (2021, arXiv 2011.13456), as gDDIM (arXiv 2206.05564) trained it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, ScalarLike

from gddim.errors import UserError
from gddim.nn.blocks import STYLES, Block, Level, apply_block, stack_runs, unstack
from gddim.nn.layers import (
    Conv,
    Dense,
    Draw,
    GroupNorm,
    augment_features,
    downsample,
    downsample_conv,
    fourier_embedding,
    one_hot_label,
    sinusoidal_embedding,
    upsample,
)
from gddim.settings import LATER, MAY_CHANGE, MAY_CHANGE_AFTER


@dataclass(frozen=True)
class NCSNppConfig:
    """An NCSN++ network, or one of its kin; the defaults are the one of gDDIM's best CIFAR-10 result."""

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
    embedding: Literal["fourier", "fourier_linear", "positional", "positional_open"] = "fourier"
    """Of the noise level: random Fourier features of its logarithm, which is for times alone, or of itself; sinusoids
    as in DDPM, or as in ADM, whose slowest does not quite reach a period of 2π 10⁴."""
    fir: bool = True
    """Resample with the filter (1, 3, 3, 1) instead of nearest neighbour and mean."""
    progressive_input: Literal["residual", "averaged", "none"] = "residual"
    """Whether a downsampled copy of the input enters every level; averaged: by a mean after its convolution, not a stride."""
    style: Literal["ncsnpp", "ddpm", "diffusers", "adm"] = field(default="ncsnpp", metadata=LATER)
    """Of the blocks: NCSN++'s; DDPM's, which resamples by convolutions between them, and as diffusers centres these; ADM's,
    which the noise level scales and shifts. All but NCSN++'s also attend after every block of an attending level on the way
    up, and divide no sums by √2."""
    rescale: bool = field(default=True, metadata=LATER)
    """Divide the sum of a branch and its shortcut by √2, in style ncsnpp (score_sde's skip_rescale)."""
    classes: int = field(default=0, metadata=LATER)
    """Classes of the data, of which the network is told one as `cond["label"]`; 0: as many as the data have."""
    augment: int = field(default=0, metadata=LATER)
    """Numbers that tell how an image was augmented, `cond["augment"]`; 0: as many as train.augment makes."""
    features: int = field(default=0, metadata=LATER)
    """Features of the noise level; 0: `width`, or twice as many for Fourier features."""
    hidden: int = field(default=0, metadata=LATER)
    """Those made of them, which the blocks see; 0: four times `width`."""
    groups: int = field(default=32, metadata=LATER)
    """Groups of a normalisation, of 4 channels at least but in styles ddpm and diffusers."""
    eps: float = field(default=1e-6, metadata=LATER)
    """Added to a variance that it divides by."""
    head: int = field(default=0, metadata=LATER)
    """Channels of a head of attention, at least; 0: all, in one."""
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
        for name, least in {"classes": 0, "augment": 0, "features": 0, "hidden": 0, "groups": 1, "head": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}: got {getattr(self, name)}, needs at least {least}")
        if self.features and (self.features < 4 or (self.fourier and self.features % 2)):
            raise UserError(f"features: got {self.features}, needs 0 or at least 4, an even number of Fourier features")
        if not 0 < self.eps < 1:
            raise UserError(f"eps: got {self.eps}, needs 0 < eps < 1")
        for name, accepted in {
            "embedding": ("fourier", "fourier_linear", "positional", "positional_open"),
            "progressive_input": ("residual", "averaged", "none"),
            "style": tuple(STYLES),
            "dtype": ("float32", "bfloat16"),
        }.items():
            if getattr(self, name) not in accepted:
                raise UserError(f"{name}: got {getattr(self, name)!r}, accepted are {', '.join(accepted)}")

    @property
    def fourier(self) -> bool:
        """Whether the noise level enters through random Fourier features."""
        return self.embedding.startswith("fourier")

    @property
    def level_features(self) -> int:
        """Of the noise level, as they enter the first layer."""
        return self.features or self.width * (1 + self.fourier)

    @property
    def hidden_features(self) -> int:
        """Of the noise level, as the blocks see them."""
        return self.hidden or 4 * self.width

    @property
    def scale(self) -> float:
        """Of the sum of a branch and its shortcut."""
        return STYLES[self.style].scale if self.rescale else 1.0

    def norm(self, channels: int) -> GroupNorm:
        """A normalisation of so many channels."""
        return GroupNorm(channels, self.groups, 1 if STYLES[self.style].by_conv else 4, self.eps)

    def heads(self, channels: int) -> int:
        """Those of an attention over so many channels; where there is none whole, ADM does not attend."""
        whole = channels // (self.head or channels)
        return whole if self.style == "adm" else max(whole, 1)

    def build(self, in_shape: tuple[int, ...], out_channels: int, key: PRNGKeyArray) -> "NCSNpp":
        """An `NCSNpp` with fresh parameters, from images `in_shape` = `(H, W, C_in)` to `(H, W, out_channels)`."""
        return NCSNpp(self, in_shape, out_channels, key=key)


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

    frequencies: Float[Array, " f"] | None
    time: tuple[Dense, Dense]
    label: Dense | None
    augment: Float[Array, "n f"] | None
    conv_in: Conv
    down: list[Level]
    middle: list[Block]
    up: list[Level]
    norm_out: GroupNorm
    conv_out: Conv
    config: NCSNppConfig = eqx.field(static=True)
    in_shape: tuple[int, ...] = eqx.field(static=True)
    logarithmic: bool = eqx.field(static=True)  # takes the logarithm of the level, which must then be positive

    def __init__(self, config: NCSNppConfig, in_shape: tuple[int, ...], out_channels: int, *, key: PRNGKeyArray):
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

        features, hidden, adm = config.level_features, config.hidden_features, config.style == "adm"
        self.frequencies = None
        if config.fourier:
            self.frequencies = 16 * math.sqrt(2) * jax.lax.erf_inv(draw.uniform((features // 2,)))
        self.time = (Dense(features, hidden, draw=draw), Dense(hidden, hidden, draw=draw))
        self.label = Dense(config.classes, hidden if adm else features, draw=draw) if config.classes else None
        first = config.width * (config.multipliers[0] if adm else 1)
        self.conv_in = Conv(channels, first, draw=draw)

        sizes = [height // 2**level for level in range(len(config.multipliers))]
        levels = list(enumerate(zip(sizes, (config.width * m for m in config.multipliers), strict=True)))
        last, by_conv, always = len(levels) - 1, STYLES[config.style].by_conv, STYLES[config.style].attend_always
        skips, pyramid, now = [first], channels, first
        self.down = []
        for level, (size, outputs) in levels:
            blocks = []
            for _ in range(config.blocks):
                blocks.append(block(now, outputs, attend=size in config.attention))
                skips.append(now := outputs)
            resample = progressive = None
            if level != last:
                resample = Conv(now, now, draw=draw) if by_conv else block(now, now, resample="down")
                skips.append(now)
                if config.progressive_input != "none":
                    progressive = Conv(pyramid, now, draw=draw)
                    pyramid = now
            self.down.append(Level(stack_runs(blocks), resample, progressive))
        self.middle = [block(now, now, attend=True), block(now, now)]
        self.up = []
        for level, (size, outputs) in reversed(levels):
            blocks, joined = [], [skips.pop() for _ in range(config.blocks + 1)]
            for i, skip in enumerate(joined):
                attend = (always or i == config.blocks) and size in config.attention
                blocks.append(block(now + skip, outputs, attend=attend))
                now = outputs
            resample = None
            if level:
                resample = Conv(now, now, draw=draw) if by_conv else block(now, now, resample="up")
            self.up.append(Level(stack_runs(blocks, joined), resample, None))
        self.norm_out = config.norm(now)
        self.conv_out = Conv(now, out_channels, scale=0.0, draw=draw)
        self.augment = draw.kernel((config.augment, features)) if config.augment else None
        self.config, self.in_shape, self.logarithmic = config, in_shape, config.embedding == "fourier"

    def __call__(
        self,
        x: Float[Array, "h w i"],
        level: ScalarLike,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "h w o"]:
        """`x` `(H, W, C_in)` at a level to float32 `(H, W, C_out)`; dropout acts if a key is given."""
        factor = 2 ** (len(self.down) - 1)
        if x.shape[-1] != self.in_shape[-1] or any(side % factor or not side for side in x.shape[:2]):
            raise ValueError(
                f"x: got shape {x.shape}, the network was built for {self.in_shape}, and takes sides that are multiples "
                f"of {factor}"
            )
        time = self._embed(level, cond)
        masks = iter(self._masks(key, *x.shape[:2]) if key is not None and self.config.dropout else ())
        apply = jax.checkpoint(apply_block) if self.config.remat else apply_block

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
                if isinstance(stage.resample, Conv):
                    h = downsample_conv(h, stage.resample, fir=False, centred=STYLES[self.config.style].centred)
                else:
                    h = single(stage.resample, h)
                if stage.progressive is not None:
                    h = pyramid = (self._progress(pyramid, stage.progressive) + h) * self.config.scale
                skips.append(h)
        for block in self.middle:
            h = single(block, h)
        for stage in self.up:
            for run in stage.runs:
                h, _ = through(run, h, [skips.pop() for _ in range(run.count)])
            if isinstance(stage.resample, Conv):
                h = stage.resample(upsample(h, fir=False))
            elif stage.resample is not None:
                h = single(stage.resample, h)
        return self.conv_out(self.norm_out(h.astype(jnp.float32), swish=True))

    def _progress(self, pyramid: Float[Array, "h w i"], conv: Conv) -> Float[Array, "h//2 w//2 o"]:
        """The input of one level, at half the size."""
        if self.config.progressive_input == "averaged" and not self.config.fir:
            return downsample(conv(pyramid), fir=False)
        return downsample_conv(pyramid, conv, self.config.fir)

    def _embed(self, level: ScalarLike, cond: PyTree) -> Float[Array, " hidden"]:
        """The features of level and class as every block takes them, swish included."""
        level, config = jnp.asarray(level, jnp.float32), self.config
        label = one_hot_label(self, cond, config.classes, config.augment)
        if self.frequencies is None:
            features = sinusoidal_embedding(level, config.level_features, last=config.embedding == "positional")
        else:
            features = fourier_embedding(level, self.frequencies, log=config.embedding == "fourier")
        if self.label is not None and config.style != "adm":
            features = features + self.label(label * math.sqrt(config.classes))  # of variance 1, as the features
        features = features + augment_features(self.augment, cond)
        features = self.time[1](jax.nn.swish(self.time[0](features)))
        if self.label is not None and config.style == "adm":
            features = features + self.label(label)
        return jax.nn.swish(features).astype(config.dtype)

    def _masks(self, key: PRNGKeyArray, height: int, width: int) -> list[Bool[Array, "*n a b o"]]:
        """What dropout keeps in each run or block, in the order of their calls: 16 random bits a value, all in one draw.

        A draw for each block would take most of the time of compiling a training step.
        """
        calls: list[tuple[int, Block | Conv | None]] = []  # each run or block with the level of its output
        for i, level in enumerate(self.down):
            calls += [*((i, run) for run in level.runs), (i + 1, level.resample)]
        calls += [(len(self.down) - 1, block) for block in self.middle]
        for i, level in zip(reversed(range(len(self.up))), self.up, strict=True):
            calls += [*((i, run) for run in level.runs), (i - 1, level.resample)]
        biases = [(i, block.conv_out.bias.shape) for i, block in calls if isinstance(block, Block)]
        shapes = [(*shape[:-1], height >> i, width >> i, shape[-1]) for i, shape in biases]
        ends = list(itertools.accumulate(math.prod(shape) // self.config.width for shape in shapes))
        # Rows as wide as the finest level, lower halves before upper ones: a TPU pads a last axis of 2 to 128.
        words = jax.random.bits(key, (-(-ends[-1] // 2), self.config.width), jnp.uint32)
        threshold = min(round(self.config.dropout * 2**16), 2**16 - 1)
        keep = jnp.concatenate([(words & 0xFFFF) >= threshold, (words >> 16) >= threshold])
        keep = jax.lax.optimization_barrier(keep)
        starts = [0, *ends[:-1]]
        return [keep[a:b].reshape(shape) for shape, a, b in zip(shapes, starts, ends, strict=True)]
