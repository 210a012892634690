"""Linear measurements of images, the A of `b = A x₀ + noise`: functions of one image `(H, W, C)` to an array.

They are what `gddim.guidance.Measured` takes, as any linear function of your own is:

>>> lower = inpainting(np.arange(8)[:, None] >= np.full(8, 4))  # the upper half is known
>>> lower(jnp.ones((8, 8, 3))).shape, pooling(4)(jnp.ones((8, 8, 3))).shape
((32, 3), (2, 2, 3))
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from gddim.sde.blurring import dct2
from gddim.sde.linalg import Array

Operator = Callable[[Array], Array]


def inpainting(missing: Shaped[np.ndarray, "..."]) -> Operator:
    """The pixels of an image that are not missing, `(n, C)`; missing are those where a mask `(H, W)` is true, or not 0.

    Raises `ValueError` for a mask of another rank, and when it measures an image of another size.
    """
    if np.ndim(missing) != 2:
        raise ValueError(f"missing has shape {np.shape(missing)}; accepted is (H, W), of all channels")
    known = np.nonzero(np.asarray(missing) == 0)

    def operator(x: Array) -> Array:
        if x.shape[:2] != np.shape(missing):
            raise ValueError(f"missing has shape {np.shape(missing)}, the image {x.shape}: their sizes must agree")
        return x[known]

    return operator


def pooling(n: int) -> Operator:
    """The means of n×n pixels: an image of n times fewer pixels a side, which n divides."""

    def operator(x: Array) -> Array:
        height, width, channels = x.shape
        return x.reshape(height // n, n, width // n, n, channels).mean((1, 3))

    return operator


def blur(std: float, height: int, width: int) -> Operator:
    """An image convolved with a Gaussian of so many pixels, which the borders reflect. Raises `ValueError` unless `std` > 0."""
    if not std > 0:
        raise ValueError(f"std={std} must be > 0")
    rows, columns = _blurring(std, height), _blurring(std, width)

    def operator(x: Array) -> Array:
        each = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
        return jnp.einsum("ai,bj,ijc->abc", *each, x, precision="highest")

    return operator


def _blurring(std: float, size: int) -> Float[np.ndarray, "n n"]:
    offsets = np.arange(-size, 2 * size)  # as far as one reflection on each side
    source = np.where(offsets < 0, -1 - offsets, np.where(offsets < size, offsets, 2 * size - 1 - offsets))
    weights = np.exp(-((np.arange(size)[:, None] - offsets) ** 2) / (2 * std**2))
    matrix = np.zeros((size, size))
    np.add.at(matrix.T, source, weights.T)
    return matrix / matrix.sum(1, keepdims=True)


def grey(x: Array) -> Array:
    """The mean of the channels, `(H, W, 1)`."""
    return x.mean(-1, keepdims=True)


def sensing(share: float, shape: tuple[int, ...], seed: int = 0) -> Operator:
    """A share of the numbers `(m,)` of a random rotation of the image: cosine transforms of it with signs drawn at random.

    Compressed sensing with rows that are orthonormal, none of which sees a pixel more than others.
    """
    rng = np.random.default_rng(seed)
    signs, size = rng.choice([-1.0, 1.0], shape), int(np.prod(shape))
    chosen = rng.permutation(size)[: max(1, round(share * size))]
    return lambda x: dct2(x * jnp.asarray(signs, x.dtype)).reshape(-1)[chosen]


def least_norm(operator: Operator, b: Array, shape: tuple[int, ...], iterations: int = 50) -> Array:
    """The smallest image of this shape that was measured as b, `Aᵀ(AAᵀ)⁻¹b`, by conjugate gradients."""
    transposed = jax.linear_transpose(operator, jax.ShapeDtypeStruct(shape, b.dtype))
    back = lambda z: transposed(z)[0]
    return back(jax.scipy.sparse.linalg.cg(lambda z: operator(back(z)), b, maxiter=iterations)[0])
