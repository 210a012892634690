"""Critically damped Langevin diffusion, in closed form but for one scalar quadrature."""

from __future__ import annotations

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from gddim.sde.base import AbstractLinearSDE, Time
from gddim.sde.linalg import Array, as_times, matrix


def unit_rule(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the n-point Gauss–Legendre rule on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (1 + x) / 2, w / 2


# For the angle of R, in float64 and in float32.
HOST_RULE, DEVICE_RULE = (unit_rule(n) for n in (96, 32))


def _gamma3(xp, x: Array) -> Array:
    """`P(3, x) = 1 − e^{−x}(1 + x + x²/2)`, by its series below 2, where the closed form cancels."""
    small = xp.minimum(x, 2.0)
    series = xp.zeros_like(x)
    for n in range(24, 2, -1):  # Horner for 6 Σ_{n≥3} x^{n−3}/n!
        series = 1 + series * small / (n + 1)
    return xp.where(x < 2, xp.exp(-small) * small**3 * series / 6, 1 - xp.exp(-x) * (1 + x + x * x / 2))


class CLD(AbstractLinearSDE):
    """`F = β [[0, m⁻¹], [−1, −Γm⁻¹]]`, `GGᵀ = diag(0, 2Γβ)`, `β = β0 + β1 t`, `Γ = 2/√m_inv`; fields (x, v).

    Dockhorn, Vahdat, Kreis, ICLR 2022 (arXiv 2112.07068), with hybrid score matching: the velocity starts at
    `N(0, γM)` and is integrated out, `Σ_0 = diag(ε, γM + ε)`, `M = 1/m_inv`.

    `m_inv`: the inverse mass, > 0; 4 lets the velocity settle at a standard deviation of ½.
    `beta0`, `beta1`: β at t = 0 per unit of time, and its slope, ≥ 0 and not both 0.
    `gamma`: γ ≥ 0, variance of the initial velocity over M.
    `epsilon`: ε > 0, variance added to both fields at t = 0.
    `horizon`: T, the time at which sampling starts.

    Raises `ValueError` outside the ranges.

    >>> sde = CLD()
    >>> R = sde.noise_factor(0.5)  # a Python time: NumPy, float64; a JAX time gives a JAX array
    >>> bool(np.allclose(R @ R.T, sde.covariance(0.5)))
    True
    >>> sde.lift(jnp.zeros((32, 32, 3))).shape  # (H, W, k, C): position and velocity of every pixel
    (32, 32, 2, 3)
    """

    m_inv: float = eqx.field(default=4.0, static=True, converter=float)
    """1/M, the inverse mass, > 0."""
    beta0: float = eqx.field(default=4.0, static=True, converter=float)
    """β at t = 0, per unit of time, ≥ 0."""
    beta1: float = eqx.field(default=0.0, static=True, converter=float)
    """Slope of β, ≥ 0."""
    gamma: float = eqx.field(default=0.04, static=True, converter=float)
    """Variance of the initial velocity over its stationary one M, ≥ 0."""
    epsilon: float = eqx.field(default=1e-6, static=True, converter=float)
    """Variance added to both fields at t = 0, > 0."""
    horizon: float = eqx.field(default=1.0, static=True, converter=float)
    """T, the time at which sampling starts."""
    k: ClassVar[int] = 2

    def __check_init__(self) -> None:
        for name in ("m_inv", "epsilon", "horizon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"CLD: {name}={getattr(self, name)} must be > 0 and finite")
        for name in ("beta0", "beta1", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"CLD: {name}={getattr(self, name)} must be ≥ 0 and finite")
        if self.beta0 + self.beta1 == 0:
            raise ValueError("CLD: beta0=0 and beta1=0 leave no diffusion; one of them must be > 0")

    def transition(self, t: Time, s: Time) -> Array:
        xp, t, s = as_times(t, s)
        return self._transition(xp, (t - s) * (self.beta0 + self.beta1 * (t + s) / 2))

    def noise_factor(self, t: Time) -> Array:
        """`R_t = L_t Rot(θ_t)`, `θ' = −β m⁻¹ √det Σ / Σ_xx`, `θ_0 = 0`: a scalar quadrature instead of a stiff matrix ODE.

        θ depends on t through `B = ∫β` alone and has a boundary layer in it, of the width b at which `Σ_xx` leaves ε, be it
        for the initial velocity, `√(ε/Σ_vv(0)) / m_inv`, or, where γ is small, for the noise, `(6ε)^{1/3} / 2√m_inv`. The
        nodes are Gauss–Legendre in z, `B = b sinh(y z²)`: where γ is small, `√det Σ` begins as `√(B + δ)` with a δ far below
        b. The rate `−√m_inv` per B that θ settles to is kept apart, since float32 holds it exactly.
        """
        xp, t = as_times(t)
        B = t * (self.beta0 + self.beta1 * t / 2)
        rule = HOST_RULE if t.dtype == np.float64 else DEVICE_RULE
        nodes, weights = (xp.asarray(x, t.dtype).reshape((1,) * t.ndim + (-1,)) for x in rule)
        velocity = math.sqrt(self.epsilon / (self.gamma / self.m_inv + self.epsilon)) / self.m_inv
        noise = (6 * self.epsilon) ** (1 / 3) / (2 * math.sqrt(self.m_inv))
        y = xp.arcsinh(B / min(velocity, noise))[..., None]
        # the layer's width, such that the last node is B exactly
        wide = y > 1e-6  # below, y/sinh(y) is 1 to 2e-13, and its derivative in float32 would be 0/0
        scale = xp.where(wide, B[..., None] / xp.where(wide, xp.sinh(y), 1), min(velocity, noise))
        xx, _, det = self._moments(xp, scale * xp.sinh(y * nodes**2))
        excess = self.m_inv * xp.sqrt(det) / xx - math.sqrt(self.m_inv)
        slope = scale * y * 2 * nodes * xp.cosh(y * nodes**2)
        theta = -math.sqrt(self.m_inv) * B - (excess * slope * weights).sum(-1)

        xx, xv, det = self._moments(xp, B)
        L_xx, L_vx, L_vv = xp.sqrt(xx), xv / xp.sqrt(xx), xp.sqrt(det / xx)
        cos, sin = xp.cos(theta), xp.sin(theta)
        return matrix(xp, [[L_xx * cos, -L_xx * sin], [L_vx * cos + L_vv * sin, L_vv * cos - L_vx * sin]])

    def to_pixels(self, u: Array) -> Array:
        return u

    def from_pixels(self, x: Array) -> Array:
        return jnp.asarray(x)

    def _transition(self, xp, b: Array) -> Array:
        """`e^{−ab/2} [[1 + ab/2, a²b/4], [−b, 1 − ab/2]]`, `a = 2√m_inv`, b the integral of β."""
        a = 2 * math.sqrt(self.m_inv)
        half = a * b / 2
        return xp.exp(-half)[..., None, None] * matrix(xp, [[1 + half, a * half / 2], [-b, 1 - half]])

    def _moments(self, xp, B: Array) -> tuple[Array, Array, Array]:
        """`Σ_xx`, `Σ_xv` and `det Σ` at `B = ∫β`, as sums without cancellation (safe in float32).

        `Σ = ε p pᵀ + (γM + ε) q qᵀ + N`, p and q the columns of Ψ(t, 0), and `det Σ` by the matrix determinant lemma.
        """
        a = 2 * math.sqrt(self.m_inv)
        x = a * B
        N_xx = _gamma3(xp, x)
        N_xv = x * x * xp.exp(-x) / a
        N_vv = (4 / a**2) * (-xp.expm1(-x) + xp.exp(-x) * x * (1 - x / 2))
        psi = self._transition(xp, B)
        e0, v0 = self.epsilon, self.gamma / self.m_inv + self.epsilon
        xx, xv, det = N_xx, N_xv, N_xx * N_vv - N_xv * N_xv + e0 * v0 * xp.exp(-2 * x)
        for variance, w_x, w_v in ((e0, psi[..., 0, 0], psi[..., 1, 0]), (v0, psi[..., 0, 1], psi[..., 1, 1])):
            xx = xx + variance * w_x * w_x
            xv = xv + variance * w_x * w_v
            det = det + variance * (w_x * w_x * N_vv - 2 * w_x * w_v * N_xv + w_v * w_v * N_xx)
        return xx, xv, det
