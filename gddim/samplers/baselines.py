"""What gDDIM is compared with: as tables for the same loop, but for the adaptive solver."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from gddim.errors import from_extra
from gddim.samplers.base import Callback, Coefficients, EpsFn, Last
from gddim.samplers.grids import check_end, check_grid
from gddim.samplers.loop import denoise, predict
from gddim.samplers.quadrature import Panels, count, history_nodes, lagrange
from gddim.samplers.solver import AbstractSampler, AbstractSolver, AbstractTableSampler, Solution
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.collocation import DIFFERENTIATE
from gddim.sde.host import as_index, on_host
from gddim.sde.linalg import Array, lq, product, triangular


class CholeskyMultistep(AbstractTableSampler):
    """The exponential Adams–Bashforth method in the Cholesky parameterisation, K = L in gDDIM's Table 1.

    `u_s = Ψ(s,t) u_t + Σ_j [∫_t^s ½ Ψ(s,τ) GGᵀ L_τ⁻ᵀ ℓ_j(τ) dτ] ε^L_j`, with `ε^L = L⁻¹R ε` as history.

    `order`: the number of nodes of the polynomials, 1 to 4. Raises `ValueError` for another.
    """

    order: int = eqx.field(default=3, static=True, converter=as_index)
    """Number of nodes, 1 to 4."""

    def __check_init__(self) -> None:
        if type(self.order) is not int or not 1 <= self.order <= 4:
            raise ValueError(f"CholeskyMultistep: order={self.order} must be 1, 2, 3 or 4")

    def nfe(self, steps: int) -> int:
        return steps

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        ts = check_grid(sde, ts)
        panels, nodes = Panels(sde, ts, lam=0.0), history_nodes(ts, self.order)
        R, psi = panels.at(sde.noise_factor, panels.tau), panels.psi(ts[1:], ts[:-1])
        Y = panels.psi(panels.times_at_nodes(ts[1:]), panels.tau) @ R
        rate = np.einsum("ij,mj...->mi...", DIFFERENTIATE, Y) @ lq(R)[1].swapaxes(-1, -2)  # ½ Ψ GGᵀ L⁻ᵀ dτ/dξ
        basis, _ = lagrange(nodes[panels.step], panels.tau)
        weights = -panels.integrate(basis[(...,) + (None,) * (Y.ndim - 2)] * rate[:, :, None])
        with np.errstate(divide="ignore", invalid="ignore"):
            rotation = lq(panels.at(sde.noise_factor, ts))[1]
        rotation = np.where(np.isfinite(rotation), rotation, np.eye(sde.k))  # where R_0 = 0; no call follows
        one = np.broadcast_to(np.eye(sde.k), (len(ts), *psi.shape[1:]))
        return Coefficients(
            ts, ts[:-1], psi, weights, noise=np.zeros_like(psi), record_u=np.zeros_like(one), record_eps=rotation @ one,
            orders=count(nodes),
        )  # fmt: skip


class EulerMaruyama(AbstractTableSampler):
    """`u_s = u − h [F u + (1+λ²)/2 GGᵀR⁻ᵀ ε] + λ √h G ξ`, `h = t − s`: the reverse family by Euler's method.

    `lam`: λ ≥ 0; 0 is Euler on the probability flow, 1 the reverse SDE. Raises `ValueError` for λ < 0.
    """

    lam: float = eqx.field(default=0.0, static=True, converter=float)
    """λ ≥ 0: 0 is the probability flow, 1 the reverse SDE."""

    def __check_init__(self) -> None:
        if not 0 <= self.lam < np.inf:
            raise ValueError(f"EulerMaruyama: lam={self.lam} must be ≥ 0")

    def nfe(self, steps: int) -> int:
        return steps

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        ts = check_grid(sde, ts)
        F, half = sde.velocity_factors(ts[:-1])
        h = -np.diff(ts).reshape(-1, *(1,) * (F.ndim - 1))
        one = np.broadcast_to(np.eye(sde.k), (len(ts), *F.shape[1:]))
        noise = self.lam * np.sqrt(h) * triangular_root(sde.diffusion_squared(ts[:-1]))
        weights = -h * (1 + self.lam**2) * half
        return Coefficients(
            ts, ts[:-1], one[1:] - h * F, weights[:, None], noise, record_u=np.zeros_like(one), record_eps=one
        )


class Heun(AbstractTableSampler):
    """Heun's second-order method on the probability flow: the trapezoidal rule with Euler's prediction, two calls a step.

    With `f = F u + ½ GGᵀR⁻ᵀ ε` as history: `û = u − h f(u, t)`, then `u_s = u − h/2 (f(u, t) + f(û, s))`. Raises
    `ValueError` for a grid that ends where R is singular (VP at t = 0).
    """

    def nfe(self, steps: int) -> int:
        return 2 * steps

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        ts = check_end(sde, check_grid(sde, ts))
        F, half = sde.velocity_factors(ts)
        one = np.broadcast_to(np.eye(sde.k), F[1:].shape)
        h = -np.diff(ts).reshape(-1, *(1,) * (F.ndim - 1)) * one
        corrector = np.stack([-h / 2, -h / 2], 1)
        return Coefficients(
            ts, ts[:-1], one, -h[:, None], np.zeros_like(h), record_u=F, record_eps=half,
            corrector=corrector, corrector_noise=np.zeros_like(h),
        )  # fmt: skip


class SSCS(AbstractTableSampler):
    """Symmetric splitting of the reverse SDE, λ = 1 (Dockhorn et al. 2022, arXiv 2112.07068, §3.3).

    Half a step of the Ornstein–Uhlenbeck process `A = −F − GGᵀS⁻¹` exactly, the kick `h GGᵀ(∇log p + S⁻¹u)` at the middle
    time, and the other half, with S the stationary covariance, `F S + S Fᵀ + GGᵀ = 0`. From that equation the transition
    of A over [s, t] is `S Ψ(t, s)ᵀ S⁻¹`. The splitting is of order 2; with its kick, one Euler step as published, marginals
    are of order 1. Raises `ValueError` for a process without a stationary covariance.
    """

    def nfe(self, steps: int) -> int:
        return steps

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        ts = check_grid(sde, ts)
        middle = (ts[1:] + ts[:-1]) / 2
        S = _stationary(sde, np.concatenate([ts, middle]))
        S_inv, one = np.linalg.inv(S), np.broadcast_to(np.eye(sde.k), (len(middle), *S.shape))
        first, first_noise = self._relax(sde, S, ts[:-1], middle)
        second, second_noise = self._relax(sde, S, middle, ts[1:])
        h = -np.diff(ts).reshape(-1, *(1,) * S.ndim)
        GG, (_, half) = sde.diffusion_squared(middle), sde.velocity_factors(middle)
        psi, weights = second @ (one + h * GG @ S_inv), -2 * h * second @ half
        noise = second_noise.copy()
        # between two kicks, the second half step of one and the first of the next are one transition
        psi[:-1], weights[:-1] = first[1:] @ psi[:-1], first[1:] @ weights[:-1]
        noise[:-1] = triangular(np.concatenate([first[1:] @ noise[:-1], first_noise[1:]], -1))
        record = np.concatenate([one, one[:1]])
        return Coefficients(
            ts, middle, psi, weights[:, None], noise, record_u=np.zeros_like(record), record_eps=record,
            start=(first[0], first_noise[0]),
        )  # fmt: skip

    @staticmethod
    def _relax(sde: AbstractLinearSDE, S: np.ndarray, t: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The transition of A from t down to s and the factor of the noise that it adds."""
        nodes, w = np.polynomial.legendre.leggauss(32)
        tau = s[:, None] + (t - s)[:, None] * (1 + nodes) / 2
        S_inv, at_s = np.linalg.inv(S), np.broadcast_to(s[:, None], tau.shape)
        within = S @ on_host(sde.transition, tau, at_s).swapaxes(-1, -2) @ S_inv
        root = triangular_root(sde.diffusion_squared(tau)) * np.sqrt((t - s)[:, None] / 2 * w)[..., None, None]
        increments = np.moveaxis(within @ root, 1, -2)
        noise = triangular(increments.reshape(len(t), sde.k, -1))
        return S @ on_host(sde.transition, t, s).swapaxes(-1, -2) @ S_inv, noise


class RK45(AbstractSampler):
    """The probability flow by Dormand–Prince 5(4) with adaptive steps (diffrax), as in Song et al. 2021.

    `rtol`, `atol`: relative and absolute tolerance of a step.

    Raises `ValueError` for a tolerance ≤ 0, a grid that ends where R is singular (VP at t = 0), or a derivative in forward
    mode: it has those of reverse mode alone.
    """

    rtol: float = eqx.field(default=1e-5, static=True, converter=float)
    """Relative tolerance of a step."""
    atol: float = eqx.field(default=1e-5, static=True, converter=float)
    """Absolute tolerance of a step."""

    def __check_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"RK45: rtol={self.rtol} and atol={self.atol} must be > 0")

    def nfe(self, steps: int) -> None:
        return None

    def solver(self, sde: AbstractLinearSDE, ts: Any, last: Last = "none") -> AdaptiveSolver:
        with from_extra("eval"):
            import diffrax  # noqa: F401  what lacks is said before a network is trained

        ts = check_end(sde, check_grid(sde, ts))
        return AdaptiveSolver(sde, self.rtol, self.atol, float(ts[0]), float(ts[-1]), last)


class AdaptiveSolver(AbstractSolver):
    """RK45 on a process, between two times."""

    sde: AbstractLinearSDE
    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    start: float = eqx.field(static=True)
    end: float = eqx.field(static=True)
    last: Last = eqx.field(static=True)

    def solve(
        self, eps_fn: EpsFn, u: Array, key: PRNGKeyArray | None, path: bool, callback: Callback | None
    ) -> Solution:
        import diffrax

        if path or callback:
            raise ValueError(
                "RK45 chooses its own steps and keeps no path, and calls nothing back: take a sampler on a grid"
            )

        def velocity(t: Array, u: Array, _: None) -> Array:
            F, half = (x.astype(u.dtype) for x in self.sde.velocity_factors(t))
            return product(F, u) + product(half, predict(eps_fn, u, t))

        start, end = jnp.asarray(self.start, u.dtype), jnp.asarray(self.end, u.dtype)
        try:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(velocity), diffrax.Dopri5(), start, end, None, u, max_steps=100_000,
                stepsize_controller=diffrax.PIDController(self.rtol, self.atol),
            )  # fmt: skip
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise ValueError("RK45 has no forward-mode derivative (jvp, jacfwd, hessian): use grad or jacrev") from None
        calls = 6 * solution.stats["num_steps"] + 1  # the last stage is the next step's first
        u = jnp.asarray(solution.ys)[0]
        if self.last == "none":
            return Solution(u, calls)
        return Solution(denoise(self.sde, eps_fn, u, self.end, self.last), calls + 1)


def triangular_root(GG: np.ndarray) -> np.ndarray:
    """A lower triangular G of a positive semidefinite GGᵀ."""
    values, vectors = np.linalg.eigh(GG)
    root = vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
    # of many factors of a singular GGᵀ one, not the one that rounding picks
    size = np.abs(root)
    return triangular(np.where(size < 1e-7 * size.max((-2, -1), keepdims=True), 0, root))


def _stationary(sde: AbstractLinearSDE, ts: np.ndarray) -> np.ndarray:
    """S with `F S + S Fᵀ + GGᵀ = 0` at all times, `(k, k)`."""
    F, GG = sde.drift(ts), sde.diffusion_squared(ts)
    message = f"SSCS needs a stationary covariance S, F S + S Fᵀ + GGᵀ = 0 at every t; {type(sde).__name__} has none"
    if F.ndim > 3:
        raise ValueError(message)
    one = np.eye(sde.k)
    kronecker = np.kron(F[0], one) + np.kron(one, F[0])
    S = np.linalg.lstsq(kronecker, -GG[0].reshape(-1), rcond=None)[0].reshape(sde.k, sde.k)
    residual = F @ S + S @ F.swapaxes(-1, -2) + GG
    if np.abs(residual).max() > 1e-6 * np.abs(GG).max() or np.linalg.eigvalsh(S).min() <= 0:
        raise ValueError(message)
    return S
