"""Processes without a closed form: two of the package, and a blurred CLD, written down from F and GGᵀ. Each is checked by

python -m gddim.check experiments.processes:phase_space_langevin
"""

import jax.numpy as jnp
import numpy as np

from gddim.sde import PSLD, CriticallyDamped, LinearSDE
from gddim.sde.blurring import dct2, frequencies, idct2

phase_space_langevin = PSLD  # the names under which results were stored


def third_order_langevin(beta: float = 4.0, epsilon: float = 1e-4, gamma: float = 0.04) -> LinearSDE:
    """Position, velocity and acceleration, noise on the last (Shi, Liu 2024)."""
    return CriticallyDamped(3, beta, gamma, epsilon)


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
