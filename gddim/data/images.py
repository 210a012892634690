"""Between stored bytes and the range [-1, 1] that a model sees; these run on the device, inside the jitted step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt8


def to_unit(x: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x / 127.5 − 1` for uint8 images, float32 in [-1, 1]; floating data (points) pass unchanged."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The nearest grey level, as an image file stores it: inverse of `to_unit`, clipped outside [-1, 1]."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


def random_flip(x: Shaped[Array, "b h w c"], key: PRNGKeyArray) -> Shaped[Array, "b h w c"]:
    """Each image of the batch mirrored left to right with probability ½."""
    mirrored = jax.random.bernoulli(key, jnp.float32(0.5), x.shape[:1])
    return jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
