"""Interpolation of the residual: what is left of the data prediction once that of Gaussian data is taken off."""

from __future__ import annotations

from typing import Any

import numpy as np

from gddim.samplers.grids import BAND, Band, noise_level
from gddim.samplers.quadrature import Panels, lagrange
from gddim.sde.base import AbstractLinearSDE, positions
from gddim.sde.collocation import DIFFERENTIATE, GAUSS_WEIGHTS, collocate, unresolved
from gddim.sde.linalg import inverse, transpose

SPREAD = 1.0  # of the logarithm of Ψ̂ over a panel: where it is more, the panel is halved


class Residual:
    """The steps of a grid for `N = (D − s²ψᵀS⁻¹u)/c`, `S = Σ + s²ψψᵀ`, `c = (s⁻² + r⁻²)^{-1/2}`, r the `noise_level`.

    For data N(0, s²) the prediction is `s²ψᵀS⁻¹u`, and N is 0: the flow is then that of `F + (1+λ²)/2 GGᵀS⁻¹`, linear. With
    its transition matrix Ψ̂ a step t → s is, for any data,

        u_s = Ψ̂(s,t) u_t + Σ_j [∫_s^t (1+λ²)/2 Ψ̂(s,τ) GGᵀΣ⁻¹ψ c(τ) ℓ_j(Φ(τ)) dτ] N_j + P^{1/2} ξ,

    `P = λ² ∫_s^t Ψ̂(s,τ) GGᵀ Ψ̂(s,τ)ᵀ dτ`, with polynomials in the `Band` Φ.
    """

    psi_hat: np.ndarray
    """`Ψ̂(s,t)`, `(steps, *#dims, k, k)`."""
    noise: np.ndarray
    """`P^{1/2}`, lower triangular."""
    kernel: np.ndarray
    """`(1+λ²)/2 Ψ̂(s,τ) GGᵀΣ⁻¹ψ c` per ξ at the nodes, `(panels, nodes, *#dims, k, 1)`."""

    def __init__(self, sde: AbstractLinearSDE, ts: np.ndarray, lam: float, data_std: Any):
        if np.ndim(data_std) and np.shape(data_std) != (dims := positions(sde)):
            takes = f"a number or a spectrum {dims}" if dims else "a number"
            raise ValueError(
                f"data_std: given a spectrum {np.shape(data_std)}; this {type(sde).__name__} takes {takes}"
            )
        self.sde, self.lam, self.s = sde, lam, np.asarray(data_std, np.float64)[..., None, None]
        self.band = Band.of(self.s.reshape(-1)[0], *BAND)
        self.panels = Panels(sde, ts, lam, self._rough)
        (self._scalar if sde.k == 1 else self._matrix)(ts)

    def clock(self, t: np.ndarray) -> np.ndarray:
        """Φ at times."""
        return self.band(noise_level(self.sde, t))

    def weights(self, nodes: np.ndarray) -> np.ndarray:
        """Those of N, `(steps, q, *#dims, k, 1)`, for nodes `(steps, q)` that are values of Φ; NaN marks an absent one."""
        basis, _ = lagrange(nodes[self.panels.step], self.clock(self.panels.tau))
        return self.panels.integrate(basis[(...,) + (None,) * (self.kernel.ndim - 2)] * self.kernel[:, :, None])

    def records(self, ts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What N is made of at times: 1/c `(n, *#dims, 1, 1)` and three rows `(n, *#dims, 1, k)`, of `N = (D + row_0 u)/c`
        and of `N = row_1 u + row_2 ε`.

        With `w = R⁻¹ψ`, `wᵀw = r⁻²`, it is `s²ψᵀS⁻¹ = c²wᵀR⁻¹`, and ε tells `D = r²wᵀ(R⁻¹u − ε)`: Tweedie's formula for the
        statistic of the data that the state is.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            R_inv = inverse(self.panels.at(self.sde.noise_factor, ts))
            w = R_inv @ self.panels.psi(ts, np.zeros_like(ts))[..., :1]
            precision = transpose(w) @ w
            one_over_c = np.sqrt(self.s**-2 + precision)
            of_u = -transpose(w / (self.s**-2 + precision)) @ R_inv
            of_eps = -one_over_c / precision * transpose(w)
            return one_over_c, of_u, one_over_c * of_u - of_eps @ R_inv, of_eps

    def _scalar(self, ts: np.ndarray) -> None:
        """k = 1: `K² = R² + s²ψ²` is of the closed form `Ψ̂(s,τ) = (K_s/K_τ) (K_s / Ψ(s,τ) K_τ)^{λ²}`, and the kernel that of

        `½ K_s/K_τ GGᵀΣ⁻¹ψ c dτ = K_s dθ`, with the angle `θ = arctan(R / sψ)`.
        """
        panels, square = self.panels, self.lam**2
        late, early = ts[:-1], ts[1:]
        K, K_tau = self._K(ts), self._K(panels.tau)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio, part = K[1:] / (panels.psi(early, late) * K[:-1]), np.divide(*self._sides(ts)) ** 2
            near_1 = np.log1p((part[1:] - part[:-1]) / (1 + part[:-1])) / 2  # where s is large
            log_excess = square * np.where(ratio < 0.5, np.log(ratio), near_1) if square else 0 * K[1:]
        self.psi_hat, self.noise = K[1:] / K[:-1] * np.exp(log_excess), K[1:] * np.sqrt(-np.expm1(2 * log_excess))
        rate = np.einsum("ij,mj...->mi...", DIFFERENTIATE, self._angle(panels.tau))
        K_s = panels.to_nodes(K[1:])
        excess = (K_s / (panels.psi(panels.times_at_nodes(early), panels.tau) * K_tau)) ** square
        self.kernel = (1 + square) * K_s * excess * rate

    def _K(self, t: np.ndarray) -> np.ndarray:
        return np.hypot(*self._sides(t))

    def _angle(self, t: np.ndarray) -> np.ndarray:
        return np.arctan2(*self._sides(t))

    def _sides(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """R and sψ."""
        return self.panels.at(self.sde.noise_factor, t), self.s * self.panels.psi(t, np.zeros_like(t))

    def _matrix(self, ts: np.ndarray) -> None:
        """k > 1: on each panel `v = Ψ(lower, τ) u` is followed by collocation. With `Y = Ψ(lower, τ) R_τ` its noise is
        `Y Yᵀ`, its signal does not move, `S_v = Y Yᵀ + s²ψψᵀ`, and `v' = (1+λ²)/2 (Y Yᵀ)' S_v⁻¹ v`.
        """
        panels = self.panels
        Y, rate, moved, _ = self._followed()
        from_lower, whole = (transpose(x) for x in collocate(-transpose(moved)))
        whole = whole @ panels.psi(panels.lower**2, panels.upper**2)
        values, vectors = np.linalg.eigh(rate @ transpose(Y) + Y @ transpose(rate))
        root = self.lam * vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
        root *= np.sqrt(GAUSS_WEIGHTS).reshape(-1, *(1,) * (rate.ndim - 2))
        left, self.psi_hat, self.noise = panels.chained(from_lower, whole, root if self.lam else None)
        w = inverse(Y) @ self._signal()
        w = w / np.sqrt(self.s**-2 + transpose(w) @ w)  # c R⁻¹ψ, at most 1
        self.kernel = (1 + self.lam**2) * (left[:, None] @ from_lower @ rate @ w)

    def _followed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Y and Y', `(1+λ²)/2 (Y Yᵀ)' S_v⁻¹`, all per ξ at the nodes, and `S_v⁻¹`."""
        Y = self.panels.local_psi() @ self.panels.at(self.sde.noise_factor, self.panels.tau)
        rate = np.einsum("ij,mj...->mi...", DIFFERENTIATE, Y)
        signal = self._signal()
        Q = np.linalg.qr(signal, mode="complete").Q  # along ψ and across it, which a large s so leaves exact
        S_v = transpose(Q) @ Y @ transpose(transpose(Q) @ Y)
        S_v[..., 0, 0] += (self.s**2 * transpose(signal) @ signal)[..., 0, 0]
        precision = Q @ np.linalg.inv(S_v) @ transpose(Q)
        inflow = (1 + self.lam**2) / 2 * (rate @ transpose(Y) + Y @ transpose(rate))
        return Y, rate, inflow @ precision, precision

    def _signal(self) -> np.ndarray:
        """`Ψ(lower, 0) e_0` of each panel, to broadcast against values at its nodes."""
        lower = self.panels.lower**2
        return self.panels.psi(lower, np.zeros_like(lower))[:, None, ..., :1]

    def _rough(self, panels: Panels) -> np.ndarray:
        self.panels = panels
        clock = unresolved(self.clock(panels.tau)[..., None, None])
        if self.sde.k == 1:
            return clock | unresolved(self._angle(panels.tau))
        _, _, moved, precision = self._followed()
        return clock | unresolved(precision) | (np.abs(moved).sum(-1).reshape(len(moved), -1).max(1) > SPREAD)
