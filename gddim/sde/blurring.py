"""Blurring diffusion: heat dissipation and noise, diagonal in the cosine basis."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gddim.sde.base import AbstractLinearSDE, Time
from gddim.sde.host import as_index
from gddim.sde.linalg import Array, as_times


def dct_matrix(n: int) -> np.ndarray:
    """The orthonormal DCT-II, `C_ki = √(2/n) cos(π (i + ½) k / n)`, row 0 scaled by 1/√2. Returns float64 `(n, n)`."""
    k, i = np.mgrid[:n, :n]
    C = np.sqrt(2 / n) * np.cos(np.pi * (i + 0.5) * k / n)
    C[0] /= np.sqrt(2)
    return C


def dct2(x: Float[Array, "H W *rest"]) -> Float[Array, "H W *rest"]:
    """The orthonormal two-dimensional DCT-II over the first two axes, as two matrix products in full precision."""
    return _separable(x, *(dct_matrix(n) for n in x.shape[:2]))


def idct2(x: Float[Array, "H W *rest"]) -> Float[Array, "H W *rest"]:
    """The inverse of `dct2`."""
    return _separable(x, *(dct_matrix(n).T for n in x.shape[:2]))


def _separable(x: Array, rows: Array, columns: Array) -> jax.Array:
    x = jnp.asarray(x)
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    return jnp.einsum("ai,bj,ij...->ab...", rows, columns, x, precision="highest")


def frequencies(size: int) -> np.ndarray:
    """`λ_ij = f_i² + f_j²`, `f_i = πi/n`: eigenvalues of minus the Laplacian on `size × size` pixels."""
    f = np.pi * np.arange(size) / size
    return f[:, None] ** 2 + f[None, :] ** 2


class Blurring(AbstractLinearSDE):
    """`Ψ(t, s) = √(α_t/α_s) d_t/d_s` per frequency, `R_t = √(1 − α_t)`: Hoogeboom, Salimans 2022 (arXiv 2209.05557).

    States are in the orthonormal DCT-II basis over H and W. `τ_t = ½ (σ_max sin²(πt/2))²`,
    `d_t = (1 − d_min) e^{−λτ_t} + d_min`, `α_t = cos²((t + 0.004)/1.008 · π/2)`.

    `size`: height and width of the images, in pixels.
    `sigma_max`: the blur at t = 1, in pixels, ≥ 0.
    `d_min`: what the blur leaves of the highest frequencies, in (0, 1].
    `horizon`: T, the largest time, ≤ 1; `start_time` is that of a noise-to-signal ratio.

    Raises `ValueError` outside the ranges.
    """

    size: int = eqx.field(default=32, static=True, converter=as_index)
    """Height and width of the images, in pixels."""
    sigma_max: float = eqx.field(default=10.0, static=True, converter=float)
    """Blur at t = 1, in pixels, ≥ 0."""
    d_min: float = eqx.field(default=1e-3, static=True, converter=float)
    """What the blur leaves of the highest frequencies, in (0, 1]."""
    horizon: float = eqx.field(default=1.0, static=True, converter=float)
    """T, the largest time, ≤ 1."""
    k: ClassVar[int] = 1

    def __check_init__(self) -> None:
        if not (isinstance(self.size, int) and self.size >= 1):
            raise ValueError(f"Blurring: size={self.size} must be a positive integer")
        if not 0 <= self.sigma_max < np.inf:
            raise ValueError(f"Blurring: sigma_max={self.sigma_max} must be ≥ 0 and finite")
        if not 0 < self.d_min <= 1:
            raise ValueError(f"Blurring: d_min={self.d_min} must lie in (0, 1]")
        if not 0 < self.horizon <= 1:
            raise ValueError(f"Blurring: horizon={self.horizon} must lie in (0, 1]")

    def transition(self, t: Time, s: Time) -> Array:
        xp, t, s = as_times(t, s)
        return (self._signal(xp, t) / self._signal(xp, s))[..., None, None]

    def noise_factor(self, t: Time) -> Array:
        xp, t = as_times(t)
        return xp.sin((t + 0.004) * (np.pi / 2 / 1.008))[..., None, None]

    def to_pixels(self, u: Array) -> Array:
        return idct2(u)

    def from_pixels(self, x: Array) -> Array:
        return dct2(x)

    def start_time(self, noise_to_signal: float = 80.0) -> float:
        """The t where `√(1 − α_t)/√α_t`, relative to `α_0`, is the given ratio: where sampling starts, just below 1."""
        alpha_0 = np.cos(0.004 / 1.008 * np.pi / 2) ** 2
        alpha = alpha_0 / ((noise_to_signal + np.sqrt(1 - alpha_0)) ** 2 + alpha_0)
        return float(np.arccos(np.sqrt(alpha)) * 1.008 * 2 / np.pi - 0.004)

    def _signal(self, xp, t: Array) -> Array:
        """`√α_t d_t`, shape `(*t.shape, size, size)`."""
        sigma = self.sigma_max * xp.sin(np.pi / 2 * t) ** 2
        eigenvalues = xp.asarray(frequencies(self.size), t.dtype).reshape((1,) * t.ndim + (self.size,) * 2)
        blur = (1 - self.d_min) * xp.exp(-eigenvalues * (sigma**2 / 2)[..., None, None]) + self.d_min
        # cos φ as the sine of the complement, which float32 has to full relative precision near t = 1
        return xp.sin(((1 - t) + 0.004) * (np.pi / 2 / 1.008))[..., None, None] * blur
