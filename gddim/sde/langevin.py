"""Langevin diffusions without a closed form of R: constant F and GGᵀ, solved by `LinearSDE`."""

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import numpy as np

from gddim.sde.general import LinearSDE


def _one_of_each(build: Callable[..., LinearSDE]) -> Callable[..., LinearSDE]:
    """Of the same numbers, of whatever library, the same object, so that it is solved once."""
    kept, signature = lru_cache(maxsize=32)(build), inspect.signature(build)
    real = {name for name, each in signature.parameters.items() if isinstance(each.default, float)}

    @wraps(build)
    def made(*args: Any, **named: Any) -> LinearSDE:
        given = signature.bind(*args, **named)
        given.apply_defaults()
        return kept(*(float(x) if name in real else np.asarray(x).item() for name, x in given.arguments.items()))

    return made


@_one_of_each
def PSLD(
    beta: float = 8.0,
    m_inv: float = 4.0,
    gamma_x: float = 0.01,
    gamma_v: float = 4.01,
    gamma: float = 0.04,
    epsilon: float = 1e-6,
    horizon: float = 1.0,
) -> LinearSDE:
    """Phase-space Langevin diffusion, noise on position and velocity (Pandey, Mandt 2023, arXiv 2303.01748).

    `F = ½β [[−Γ_x, M⁻¹], [−1, −Γ_v]]`, `GGᵀ = β diag(Γ_x, M Γ_v)`, `Σ_0 = diag(ε, γM)`; fields (x, v). It settles at
    N(0, 1) × N(0, M), and is critically damped where `(Γ_x − Γ_v)² = 4 M⁻¹`. Raises `ValueError` outside the ranges.

    `beta`: per unit of time, > 0. `m_inv`: 1/M, > 0. `gamma_x`, `gamma_v`: friction of the fields, ≥ 0. `gamma`: variance of
    the initial velocity over M, > 0. `epsilon`: variance of the position at t = 0, > 0.
    """
    if not (min(beta, m_inv, gamma_x + gamma_v, gamma, epsilon) > 0 and min(gamma_x, gamma_v) >= 0):
        raise ValueError(
            f"PSLD(beta={beta}, m_inv={m_inv}, gamma_x={gamma_x}, gamma_v={gamma_v}, gamma={gamma}, epsilon={epsilon}): "
            "beta, m_inv, gamma and epsilon must be > 0, gamma_x and gamma_v ≥ 0 and not both 0"
        )
    F = beta / 2 * np.array([[-gamma_x, m_inv], [-1.0, -gamma_v]])
    GG = beta * np.diag([gamma_x, gamma_v / m_inv])
    return LinearSDE(lambda t: F, lambda t: GG, np.diag([epsilon, gamma / m_inv]), horizon)


@_one_of_each
def CriticallyDamped(
    order: int = 3,
    beta: float = 4.0,
    gamma: float = 0.04,
    epsilon: float = 1e-4,
    horizon: float = 1.0,
) -> LinearSDE:
    """Critically damped Langevin diffusion of order n: a chain of n fields, noise on the last, F with one n-fold eigenvalue.

    `F/β` is tridiagonal and skew but for its last entry, `GGᵀ = 2βn√(2n−3) e_n e_nᵀ`, so that it settles at N(0, I). The
    couplings `√((2n−3)(n²−j²)/((2j−1)(2j+1)))`, j = n−1 … 1, are those of Schwarz's form of `(s + √(2n−3))ⁿ`; the first
    is 1. Order 2 is `CLD(m_inv, beta0=beta/√m_inv)` in units of the stationary velocity, order 3 that of Shi, Liu 2024:
    `F/β = [[0, 1, 0], [−1, 0, √8], [0, −√8, −√27]]`. Raises `ValueError` outside the ranges.

    `order`: n, the number of fields, ≥ 2. `beta`: per unit of time, > 0. `gamma`: variance of the other fields at t = 0 over
    that at which they settle, > 0. `epsilon`: variance of the data's field at t = 0, > 0.
    """
    n = order
    if not (isinstance(n, int) and n >= 2 and min(beta, gamma, epsilon) > 0):
        raise ValueError(
            f"CriticallyDamped(order={order}, beta={beta}, gamma={gamma}, epsilon={epsilon}): order must be an integer ≥ 2, "
            "beta, gamma and epsilon > 0"
        )
    j = np.arange(n - 1, 0, -1)
    coupling = np.sqrt((2 * n - 3) * (n**2 - j**2) / ((2 * j - 1) * (2 * j + 1)))
    last = np.diag([*np.zeros(n - 1), n * np.sqrt(2 * n - 3)])
    F = beta * (np.diag(coupling, 1) - np.diag(coupling, -1) - last)
    return LinearSDE(lambda t: F, lambda t: 2 * beta * last, np.diag([epsilon, *[gamma] * (n - 1)]), horizon)
