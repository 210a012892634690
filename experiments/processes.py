"""Processes without a closed form, written down from F and GGᵀ: ten lines each, checked by

python -m gddim.check experiments.processes:phase_space_langevin
"""

import jax.numpy as jnp
import numpy as np

from gddim.sde import LinearSDE
from gddim.sde.blurring import dct2, frequencies, idct2


def phase_space_langevin(
    beta: float = 8.0, m_inv: float = 4.0, gamma_x: float = 0.01, gamma_v: float = 4.01, gamma: float = 0.04
) -> LinearSDE:
    """PSLD, noise on position and velocity (Pandey, Mandt 2023, arXiv 2303.01748):
    `F = ½β [[−Γ_x, M⁻¹], [−1, −Γ_v]]`, `GGᵀ = β diag(Γ_x, M Γ_v)`.
    """
    F = beta / 2 * np.array([[-gamma_x, m_inv], [-1.0, -gamma_v]])
    GG = beta * np.diag([gamma_x, gamma_v / m_inv])
    return LinearSDE(lambda t: F, lambda t: GG, np.diag([1e-6, gamma / m_inv]))


def third_order_langevin(beta: float = 4.0, epsilon: float = 1e-4, gamma: float = 0.04) -> LinearSDE:
    """Position, velocity and acceleration, noise on the last (Shi, Liu 2024), critically damped: F/β has −√3 three times.

    `F = β [[0, 1, 0], [−1, 0, √8], [0, −√8, −√27]]`, `GGᵀ = 2β√27 diag(0, 0, 1)`; it settles at N(0, I).
    """
    F = beta * np.array([[0, 1, 0], [-1, 0, np.sqrt(8)], [0, -np.sqrt(8), -np.sqrt(27)]])
    GG = 2 * beta * np.sqrt(27) * np.diag([0.0, 0.0, 1.0])
    return LinearSDE(lambda t: F, lambda t: GG, np.diag([epsilon, gamma, gamma]))


def blurred_langevin(
    size: int = 32, sigma_max: float = 10.0, d_min: float = 1e-3, m_inv: float = 4.0, beta: float = 4.0,
    gamma: float = 0.04, epsilon: float = 1e-6,
) -> LinearSDE:  # fmt: skip
    """CLD whose position is blurred on the way, one 2×2 system per frequency of the cosine basis.

    CLD's F, with `(log d_t)'` of `gddim.Blurring` added to its position: `d_t = (1 − d_min) e^{−λτ_t} + d_min`.
    """
    F = beta * np.array([[0.0, m_inv], [-1.0, -2 * np.sqrt(m_inv)]])[None, None]
    GG = np.diag([0.0, 4 * beta / np.sqrt(m_inv)])
    eigenvalues, on_position = frequencies(size), np.diag([1.0, 0.0])[None, None]

    def drift(t):
        sine, cosine = jnp.sin(jnp.pi * t / 2), jnp.cos(jnp.pi * t / 2)
        blur = (1 - d_min) * jnp.exp(-eigenvalues * sigma_max**2 * sine**4 / 2)
        rate = -eigenvalues * sigma_max**2 * jnp.pi * sine**3 * cosine * blur / (blur + d_min)
        return F + rate[..., None, None] * on_position

    initial = np.diag([epsilon, gamma / m_inv + epsilon])
    return LinearSDE(drift, lambda t: GG, initial, basis=(dct2, idct2))


def blurred_langevin_8() -> LinearSDE:
    """`blurred_langevin` on 8×8 pixels, small enough for a quick check."""
    return blurred_langevin(8)
