"""The layers of NCSN++ (Song et al. 2021), for one example at a time: images are `(H, W, C)`, kernels HWIO.

Parameters are float32; a layer computes in the type of its input. Under `jax.vmap`, `conv(x[None], w)[0]` becomes
one batched NHWC/HWIO convolution, which is the layout that every XLA backend runs fast.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from gddim.errors import UserError
from gddim.nn.convolution import conv_same
from gddim.nn.whole import whole


class Draw:
    """Hands out initial values, cut from draws of 2²² at a time: a draw for each parameter compiles for a minute."""

    def __init__(self, key: PRNGKeyArray):
        self._key, self._draws = key, 0
        self._left: Any = np.zeros(0, np.float32)

    def uniform(self, shape: tuple[int, ...], bound: float = 1.0) -> Float[Array, "..."]:
        """Uniform in (-bound, bound)."""
        size, parts = math.prod(shape), []
        while size > self._left.size:
            if self._left.size:  # XLA of jax 0.11.2 crashes on an empty constant in `shard_map`
                parts.append(self._left)
            size -= self._left.size
            key, self._draws = jax.random.fold_in(self._key, self._draws), self._draws + 1
            more = jax.random.uniform(key, (2**22,), jnp.float32, np.nextafter(np.float32(-1), np.float32(0)))
            self._left = more if isinstance(more, Tracer) else np.asarray(more)  # NumPy's slices compile nothing
        parts.append(self._left[:size])
        self._left = self._left[size:]
        xp = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
        return jnp.asarray(xp.concatenate(parts).reshape(shape) * np.float32(bound))

    def kernel(self, shape: tuple[int, ...], scale: float = 1.0) -> Float[Array, "..."]:
        """Uniform, of variance `scale` / mean of fan-in and fan-out, as published; `scale` 0 stands for 1e-10."""
        fan = math.prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2
        return self.uniform(shape, math.sqrt(3 * (scale or 1e-10) / fan))


def constant(value: float, size: int) -> Float[Array, " n"]:
    """A vector of one value, made without compiling a program for its size."""
    return jnp.asarray(np.full(size, value, np.float32))


class Dense(eqx.Module):
    """`x W + b` over the last axis."""

    weight: Float[Array, "i o"]
    bias: Float[Array, " o"]

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0, draw: Draw):
        self.weight = draw.kernel((inputs, outputs), scale)
        self.bias = constant(0.0, outputs)

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        bias = self.bias.astype(x.dtype)
        return x @ self.weight.astype(x.dtype) + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))


class Conv(eqx.Module):
    """Convolution with an odd square kernel; zeros beyond the border keep the size."""

    weight: Float[Array, "k k i o"]
    bias: Float[Array, " o"]

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, scale: float = 1.0, draw: Draw):
        self.weight = draw.kernel((size, size, inputs, outputs), scale)
        self.bias = constant(0.0, outputs)

    def __call__(self, x: Float[Array, "h w i"]) -> Float[Array, "h w o"]:
        return conv_same(x[None], self.weight.astype(x.dtype))[0] + self.bias.astype(x.dtype)[None, None]


class GroupNorm(eqx.Module):
    """Group normalisation, statistics in float32; then swish if asked.

    The sums are taken per channel, then per group: XLA reduces the image once, without a 5-D reshape of it. For the
    backward pass only the input, in its own type, and the statistics are kept: the rest, twice as wide in bfloat16, is
    computed again from them.
    """

    scale: Float[Array, " c"]
    bias: Float[Array, " c"]
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, groups: int = 32, least: int = 4, eps: float = 1e-6):
        """As many equal groups of `channels` as `groups`, or fewer so that each has `least`."""
        self.groups, self.eps = min(channels // least, groups), eps
        if self.groups == 0 or channels % self.groups:
            raise UserError(
                f"width: a layer of {channels} channels cannot be normalised in min(channels // {least}, {groups}) equal "
                f"groups; choose a width that is a multiple of {least} up to {least * groups}, a multiple of {groups} beyond"
            )
        self.scale = constant(1.0, channels)
        self.bias = constant(0.0, channels)

    def __call__(self, x: Float[Array, "h w c"], swish: bool = False) -> Float[Array, "h w c"]:
        keep = jax.checkpoint_policies.save_only_these_names("moments")
        apply = jax.checkpoint(partial(self._apply, swish=swish), policy=keep, prevent_cse=False)
        return apply(x, self.scale, self.bias)

    def _apply(self, x: Array, scale: Array, bias: Array, swish: bool) -> Array:
        wide = x.astype(jnp.float32)
        moments = jnp.stack([jnp.mean(wide, axis=(0, 1)), jnp.mean(wide * wide, axis=(0, 1))])
        moments = jnp.mean(moments.reshape(2, self.groups, -1), axis=2, keepdims=True)
        mean, square = checkpoint_name(moments, "moments")
        inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + self.eps)
        gain = scale.reshape(self.groups, -1) * inverse
        shift = bias.reshape(self.groups, -1) - mean * gain
        y = wide * gain.reshape(1, 1, -1) + shift.reshape(1, 1, -1)
        return (jax.nn.swish(y) if swish else y).astype(x.dtype)


class Attention(eqx.Module):
    """Self-attention over all pixels, `(x + out(attend(norm(x)))) scale`, in equal heads; softmax in float32."""

    norm: GroupNorm
    query: Dense
    key: Dense
    value: Dense
    out: Dense
    heads: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(self, norm: GroupNorm, heads: int, scale: float, *, draw: Draw):
        channels = norm.bias.size
        if channels % heads:
            raise UserError(f"head: {channels} channels cannot be cut into {heads} equal heads")
        self.norm, self.heads, self.scale = norm, heads, scale
        self.query, self.key, self.value = (Dense(channels, channels, scale=0.1, draw=draw) for _ in range(3))
        self.out = Dense(channels, channels, scale=0.0, draw=draw)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        x = whole(x)
        h = self.norm(x).reshape(-1, x.shape[-1])
        parts = (dense(h).reshape(1, h.shape[0], self.heads, -1) for dense in (self.query, self.key, self.value))
        with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 and float32 inside
            h = jax.nn.dot_product_attention(*parts)  # of (batch, pixels, heads, channels)
        return (x + self.out(h.reshape(x.shape))) * self.scale


def refuse_cond(net: eqx.Module, cond: Any) -> None:
    """Raise `ValueError` where a network that takes no condition is given one, which it would leave out silently."""
    if cond is not None:
        raise ValueError(f"cond: given {jax.tree.structure(cond)}; this {type(net).__name__} takes None")


def one_hot_label(net: eqx.Module, cond: Any, classes: int, augment: int = 0) -> Float[Array, " {classes}"]:
    """Of `cond["label"]`, the number of a class; zeros, no class, where that is −1 or nothing.

    Raises `ValueError` for other conditions than it and, of so many numbers, `cond["augment"]`.
    """
    taken = {"label": ()} if classes else {}
    taken |= {"augment": (augment,)} if augment else {}
    if not taken:
        refuse_cond(net, cond)
    told = {} if cond is None else cond
    if not isinstance(told, Mapping) or any(taken.get(name) != jnp.shape(x) for name, x in told.items()):
        words = ", ".join(
            {"label": '"label": class', "augment": f'"augment": {augment} numbers'}[name] for name in taken
        )
        raise ValueError(f"cond: given {jax.tree.structure(cond)}; this {type(net).__name__} takes None or {{{words}}}")
    if "label" not in told:
        return jnp.zeros(classes, jnp.float32)
    return jax.nn.one_hot(told["label"], classes, dtype=jnp.float32)


def augment_features(weight: Float[Array, "n f"] | None, cond: Any) -> Float[Array, " f"] | float:
    """Of `cond["augment"]`, by a linear map without a bias, which of an image as it is makes 0."""
    if weight is None or "augment" not in (cond or {}):
        return 0.0
    return cond["augment"].astype(weight.dtype) @ weight


def fourier_embedding(t: Float[Array, ""], frequencies: Float[Array, " n"], log: bool = True) -> Float[Array, " 2*n"]:
    """`[sin, cos](2π log(t) frequencies)`, or of t itself, the frequencies fixed."""
    # Angles reach thousands of radians, so the order of the float32 products is that of the published networks.
    frequencies = jax.lax.stop_gradient(frequencies)
    angles = jnp.log(t) * frequencies * 2 * jnp.pi if log else t * (2 * jnp.pi * frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def sinusoidal_embedding(t: Float[Array, ""], features: int, last: int = 1) -> Float[Array, " {features}"]:
    """`[sin, cos](t 10000^(-i/(n-last)))`, n = features // 2: last 1 as in DDPM, 0 as in ADM; an odd last feature is 0."""
    half = features // 2
    angles = t * jnp.exp(-math.log(10000) / (half - last) * jnp.arange(half, dtype=jnp.float32))
    return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)]), (0, features % 2))


def upsample(x: Float[Array, "h w c"], fir: bool) -> Float[Array, "2*h 2*w c"]:
    """Twice the size: nearest neighbour, or zeros in between filtered with (1, 3, 3, 1)/4 along both axes."""
    if not fir:
        height, width, channels = x.shape
        return jnp.broadcast_to(x[:, None, :, None], (height, 2, width, 2, channels)).reshape(
            2 * height, 2 * width, channels
        )
    for axis in (0, 1):  # the two phases of the filter, each of two taps
        before, after = _neighbours(x, axis)
        shape = list(x.shape)
        shape[axis] *= 2
        x = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis=axis + 1).reshape(shape)
    return x


def downsample(x: Float[Array, "h w c"], fir: bool) -> Float[Array, "h//2 w//2 c"]:
    """Half the size: mean of 2x2, or filtered with (1, 3, 3, 1)/8 along both axes; zero beyond the border."""
    for axis in (0, 1):
        shape = list(x.shape)
        shape[axis : axis + 1] = [shape[axis] // 2, 2]
        even, odd = (jnp.take(x.reshape(shape), phase, axis=axis + 1) for phase in (0, 1))
        if fir:
            x = 0.125 * (_neighbours(odd, axis)[0] + _neighbours(even, axis)[1]) + 0.375 * (even + odd)
        else:
            x = 0.5 * (even + odd)
    return x


def downsample_conv(
    x: Float[Array, "h w i"], conv: Conv, fir: bool, centred: bool = False
) -> Float[Array, "h//2 w//2 o"]:
    """Half the size by a strided 3x3 convolution, with the filter (1, 3, 3, 1)/8 before it if `fir`; of even sizes it sees a
    pixel beyond the lower right border, or, if `centred`, one beyond the upper left.
    """
    padding = "VALID" if fir else [(1, 1), (1, 1)] if centred else "SAME"
    if fir:
        for axis in (0, 1):  # with two zeros on either side: one sample longer than x
            pad = [(0, 0)] * 3
            pad[axis] = (2, 2)
            taps = [jax.lax.slice_in_dim(jnp.pad(x, pad), i, i + x.shape[axis] + 1, axis=axis) for i in range(4)]
            x = 0.125 * (taps[0] + taps[3]) + 0.375 * (taps[1] + taps[2])
    y = jax.lax.conv_general_dilated(
        x[None], conv.weight.astype(x.dtype), (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    return y + conv.bias.astype(x.dtype)[None, None]


def _neighbours(x: Float[Array, "h w c"], axis: int) -> tuple[Float[Array, "h w c"], Float[Array, "h w c"]]:
    """The values one before and one after along `axis`, zero beyond the border."""
    pad = [(0, 0)] * 3
    pad[axis] = (1, 1)
    padded, n = jnp.pad(x, pad), x.shape[axis]
    return (
        jax.lax.slice_in_dim(padded, 0, n, axis=axis),
        jax.lax.slice_in_dim(padded, 2, n + 2, axis=axis),
    )
