"""Coefficients by the method of the published code: R by many float32 Runge–Kutta steps, weights by Riemann sums.

Zhang, Tao, Chen 2023 (arXiv 2206.05564), appendix C; written anew, in float32 throughout as there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gddim.samplers.quadrature import history_nodes
from gddim.sde import CLD, Blurring
from gddim.sde.linalg import inverse, transpose

Rate = Callable[[Array], Array]  # of times (points,), to ½ GGᵀR⁻ᵀ, (points, *#dims, k, k)
Psi = Callable[[Array, Array], Array]


def published_cld(sde: CLD, ts: Float[np.ndarray, " n"], order: int, steps: int, points: int) -> np.ndarray:
    """The weights for CLD, with R from `steps` classical Runge–Kutta steps over [0, T]."""
    R = jax.jit(lambda: integrate(sde, steps))()

    def rate(tau: Array) -> Array:
        nearest = R[jnp.round(tau / sde.horizon * steps).astype(int)]
        return jax.vmap(lambda t: half_diffusion(sde, t))(tau) @ transpose(inverse(nearest))

    return riemann(rate, sde.transition, ts, order, points)


def published_blurring(sde: Blurring, ts: Float[np.ndarray, " n"], order: int, points: int) -> np.ndarray:
    """Those for blurring, whose R is known."""
    return riemann(jax.vmap(lambda t: sde.velocity_factors(t)[1]), sde.transition, ts, order, points)


def half_diffusion(sde: CLD, t: Array) -> Array:
    """`½ GGᵀ = diag(0, Γβ)`, `Γ = 2/√m_inv`."""
    return 2 / np.sqrt(sde.m_inv) * (sde.beta0 + sde.beta1 * t) * jnp.diag(jnp.array([0.0, 1.0]))


def integrate(sde: CLD, steps: int) -> Float[Array, "m 2 2"]:
    """R at `steps + 1` even times, by `R' = (F + ½GGᵀΣ⁻¹) R` with `Σ⁻¹R = R⁻ᵀ`."""
    F = jnp.array([[0.0, sde.m_inv], [-1.0, -2 * np.sqrt(sde.m_inv)]])
    h = sde.horizon / steps

    def slope(t: Array, R: Array) -> Array:
        return (sde.beta0 + sde.beta1 * t) * (F @ R) + half_diffusion(sde, t) @ transpose(inverse(R))

    def step(R: Array, t: Array) -> tuple[Array, Array]:
        a = slope(t, R)
        b = slope(t + h / 2, R + h / 2 * a)
        c = slope(t + h / 2, R + h / 2 * b)
        d = slope(t + h, R + h * c)
        return R + h / 6 * (a + 2 * b + 2 * c + d), R

    R = jnp.asarray(sde.noise_factor(0.0), jnp.float32)
    last, before = jax.lax.scan(step, R, jnp.arange(steps, dtype=jnp.float32) * h)
    return jnp.concatenate([before, last[None]])


def riemann(rate: Rate, psi: Psi, ts: Float[np.ndarray, " n"], order: int, points: int) -> np.ndarray:
    """`∫_t^s Ψ(s,τ) ½GGᵀR⁻ᵀ ℓ_j(τ) dτ` of every step, each by a mean over `points` times."""
    nodes = history_nodes(ts, order)

    def weights(row: tuple[Array, Array, Array]) -> Array:
        s, t, nodes = row
        tau = t + (s - t) * jnp.linspace(0.0, 1.0, points)
        integrand = jax.vmap(psi, (None, 0))(s, tau) @ rate(tau)
        mean = [jnp.tensordot(_lagrange(nodes, j, tau), integrand, 1) / points for j in range(order)]
        return (s - t) * jnp.stack(mean)

    rows = tuple(jnp.asarray(x, jnp.float32) for x in (ts[1:], ts[:-1], nodes))
    return np.asarray(jax.jit(lambda rows: jax.lax.map(weights, rows))(rows), np.float64)


def _lagrange(nodes: Array, j: int, tau: Array) -> Array:
    """`ℓ_j` on the nodes that exist (the others are NaN); 0 if node j does not."""
    value = jnp.ones_like(tau)
    for other in range(len(nodes)):
        if other != j:
            factor = (tau - nodes[other]) / (nodes[j] - nodes[other])
            value = value * jnp.where(jnp.isnan(nodes[other]), 1.0, factor)
    return jnp.where(jnp.isnan(nodes[j]), 0.0, value)
