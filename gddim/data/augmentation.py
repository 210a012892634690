"""EDM's geometric augmentation (Karras et al. 2022, arXiv 2206.00364), on the device: a network is told what was done."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, ScalarLike

AUGMENT = "augment"
"""The entry of `cond` in which a network is told, zeros, or nothing, for images as they are."""
NUMBERS = 9
"""That tell it: mirrored left to right and top to bottom; log₂ of the scale over 0.2; cos − 1 and sin of the rotation; log₂
of the stretching over 0.2, times cos and sin of its direction; the translation across and down over an eighth of the side."""


def augmented(
    x: Float[Array, "b h w c"], keys: Key[Array, " b"], share: ScalarLike
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 9"]]:
    """Images mirrored left to right at random, and each otherwise transformed with probability `share` a kind: mirrored top to
    bottom, scaled by 2^(0.2 n), turned by any angle, stretched by 2^(0.2 n) along any direction or along the sides, moved by
    n/8 of the sides, n standard normal; and the numbers that say so. At 0 they are the images themselves.

    `x`: in any scale; `keys`: one for each.

    What lies beyond the border is reflected, and between pixels interpolated by Catmull and Rom's cubic.
    """
    return jax.vmap(lambda x, key: _augmented(x, key, jnp.asarray(share, x.dtype)))(x, keys)


def _augmented(x: Array, key: Array, share: Array) -> tuple[Array, Array]:
    keys = iter(jax.random.split(key, 14))
    maybe = lambda value, p=share: jnp.where(jax.random.uniform(next(keys), dtype=x.dtype) < p, value, 0)
    normal = lambda shape=(): jax.random.normal(next(keys), shape, x.dtype)
    angle = lambda: jnp.pi * jax.random.uniform(next(keys), (), x.dtype, -1, 1)
    half = jnp.asarray(0.5, x.dtype)
    mirrored = maybe(jnp.where(share > 0, 1, 0).astype(x.dtype), half)
    upset = maybe(maybe(jnp.ones((), x.dtype), half))
    scale, turn, stretch, direction = maybe(normal()), maybe(angle()), maybe(normal()), maybe(angle(), half)
    move = maybe(normal((2,)))
    x = jnp.where(mirrored > 0, x[:, ::-1], x)
    x = jnp.where(upset > 0, x[::-1], x)
    s = jnp.exp2(0.2 * stretch)
    back = jnp.exp2(-0.2 * scale) * _turned(turn - direction) @ jnp.diag(jnp.stack([1 / s, s])) @ _turned(direction)
    size = jnp.asarray([x.shape[1], x.shape[0]], x.dtype)
    changed = (scale != 0) | (turn != 0) | (stretch != 0) | (move != 0).any()
    x = jnp.where(changed, _resampled(x, back, move * size / 8), x)
    told = [mirrored, upset, scale, jnp.cos(turn) - 1, jnp.sin(turn)]
    told += [stretch * jnp.cos(direction), stretch * jnp.sin(direction), move[0], move[1]]
    return x, jnp.stack(told)


def _turned(angle: Array) -> Float[Array, "2 2"]:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def _resampled(x: Float[Array, "h w c"], back: Float[Array, "2 2"], move: Float[Array, " 2"]) -> Float[Array, "h w c"]:
    """Each pixel p, (x, y) from the centre, from where `back (p − move)` was."""
    height, width, _ = x.shape
    centre = jnp.asarray([(width - 1) / 2, (height - 1) / 2], x.dtype)
    rows, columns = jnp.indices((height, width)).astype(x.dtype)
    places = jnp.stack([columns, rows], -1) - (centre + move)[None, None]
    u, v = (jnp.einsum("ij,abj->iab", back, places, precision="highest") + centre[:, None, None]).astype(x.dtype)
    across, down = _taps(u, width), _taps(v, height)
    return sum((wy * wx)[..., None] * x[iy, ix] for iy, wy in down for ix, wx in across)  # pyright: ignore[reportReturnType]


def _taps(place: Float[Array, "h w"], size: int) -> list[tuple[Int[Array, "h w"], Float[Array, "h w"]]]:
    """The four pixels of an axis about each place, and their weights."""
    first = jnp.floor(place)
    f = place - first
    weights = [
        ((2 - f) * f - 1) * f / 2,
        ((3 * f - 5) * f * f + 2) / 2,
        ((4 - 3 * f) * f + 1) * f / 2,
        (f - 1) * f * f / 2,
    ]
    period = max(2 * (size - 1), 1)
    found = []
    for i, weight in enumerate(weights):
        index = (first.astype(jnp.int32) + (i - 1)) % period
        found.append((jnp.where(index < size, index, period - index), weight))
    return found
