"""Ψ̂ and its noise over the steps of a grid, in the coordinates `R⁻¹u`, for any λ."""

from __future__ import annotations

import numpy as np

from gddim.samplers.quadrature import Panels
from gddim.sde.collocation import GAUSS_WEIGHTS, collocate
from gddim.sde.linalg import triangular


class Contraction:
    """`Z(a, b) = R_a⁻¹ Ψ̂(a, b) R_b` for a < b, and the noise of a step.

    `Z` solves `∂_a Z = (λ²/2) M Z`, `M = R⁻¹GGᵀR⁻ᵀ` symmetric and positive: a contraction, I at λ = 0. For k = 1 it is a power
    of `R_a / (Ψ(a, b) R_b)`; else it is found by collocation on each panel. `noise` is the triangular factor of
    `P = R_s (I − Z(s,t) Z(s,t)ᵀ) R_sᵀ = R_s [∫_s^t λ² Z(s,τ) M Z(s,τ)ᵀ dτ] R_sᵀ`, by the integral, which does not cancel.
    """

    step: np.ndarray
    """`Z(s, t)`, (steps, *#dims, k, k)."""
    from_s: np.ndarray
    """`Z(s, τ)` at the nodes, (panels, nodes, *#dims, k, k)."""
    to_t: np.ndarray
    """`Z(τ, t)` at the nodes."""
    noise: np.ndarray
    """(steps, *#dims, k, k)."""

    def __init__(self, panels: Panels, R: np.ndarray):
        if panels.lam == 0:
            one = np.eye(R.shape[-1]).reshape((1,) * (R.ndim - 3) + R.shape[-2:])
            self.step = np.broadcast_to(one, R[1:].shape)
            self.from_s = self.to_t = np.broadcast_to(one, (*panels.tau.shape, *one.shape))
            self.noise = np.zeros((len(R) - 1, *panels.psi(panels.ts[1:], panels.ts[:-1]).shape[1:]))
        elif R.shape[-1] == 1:
            self._scalar(panels, R)
        else:
            self._matrix(panels, R)

    def _scalar(self, panels: Panels, R: np.ndarray) -> None:
        s, t, tau = panels.ts[1:], panels.ts[:-1], panels.tau
        at_s, at_t = panels.times_at_nodes(s), panels.times_at_nodes(t)
        R_tau, square = panels.at(panels.sde.noise_factor, tau), panels.lam**2
        with np.errstate(divide="ignore"):
            log_step = square * np.log(R[1:] / (panels.psi(s, t) * R[:-1]))
        self.step = np.exp(log_step)
        self.from_s = (panels.to_nodes(R[1:]) / (panels.psi(at_s, tau) * R_tau)) ** square
        self.to_t = (R_tau / (panels.psi(tau, at_t) * panels.to_nodes(R[:-1]))) ** square
        self.noise = R[1:] * np.sqrt(-np.expm1(2 * log_step))

    def _matrix(self, panels: Panels, R: np.ndarray) -> None:
        square, rate = panels.lam**2, panels.log_rate()
        from_lower, whole = (x.swapaxes(-1, -2) for x in collocate(-square * rate))
        to_upper, _ = collocate(square * rate, backward=True)
        values, vectors = np.linalg.eigh(rate)
        root = vectors * np.sqrt(2 * square * np.maximum(values, 0))[..., None, :]
        root *= np.sqrt(GAUSS_WEIGHTS).reshape(-1, *(1,) * (rate.ndim - 2))
        left, self.step, factor = panels.chained(from_lower, whole, root)
        self.noise = triangular(R[1:] @ factor)
        right = np.empty_like(whole)  # Z(upper, t)
        for start, stop in panels.spans():
            Z = np.broadcast_to(np.eye(R.shape[-1]), whole.shape[1:])
            for p in reversed(range(start, stop)):
                right[p] = Z
                Z = whole[p] @ Z
        self.from_s, self.to_t = left[:, None] @ from_lower, to_upper @ right[:, None]
