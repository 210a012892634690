"""The fast solvers of others, for any linear SDE: as tables for the same loop, and for VP equal to their own code.

DEIS-tAB3 (Zhang, Chen, arXiv 2204.13902) is not among them: it is `GDDIM(order=4)` on VP.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import equinox as eqx
import numpy as np

from gddim.samplers.base import Coefficients
from gddim.samplers.grids import check_grid, noise_level
from gddim.samplers.quadrature import Panels, corrected_for_free, count, history_nodes
from gddim.samplers.residual import Residual
from gddim.samplers.solver import AbstractTableSampler
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.collocation import DIFFERENTIATE
from gddim.sde.host import as_index
from gddim.sde.linalg import as_static, inverse

ADAMS = [np.array([1.0]), np.array([3, -1]) / 2, np.array([23, -16, 5]) / 12, np.array([55, -59, 37, -9]) / 24]


class IPNDM(AbstractTableSampler):
    """DDIM with the weights of Adams and Bashforth for equal steps, on ε: `u_s = Ψ u_t + (R_s − Ψ R_t) Σ_j a_j ε_j`.

    Liu et al. 2022 (PNDM, arXiv 2202.09778) as Zhang, Chen 2022 (arXiv 2204.13902) use it; for CLD and others R takes the
    place of σ. The first steps use the orders that their history allows.

    `order`: the number of nodes, 1 (DDIM) to 4. Raises `ValueError` for another.
    """

    order: int = eqx.field(default=3, static=True, converter=as_index)
    """Number of nodes, 1 (DDIM) to 4."""

    def __check_init__(self) -> None:
        _check_order(self, len(ADAMS))

    def nfe(self, steps: int) -> int:
        return steps

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        ts = check_grid(sde, ts)
        panels = Panels(sde, ts, lam=0.0)
        R, psi = panels.at(sde.noise_factor, ts), panels.psi(ts[1:], ts[:-1])
        step, orders = R[1:] - psi @ R[:-1], np.minimum(1 + np.arange(len(psi)), self.order)
        constants = np.stack([np.pad(ADAMS[q - 1], (0, self.order - q)) for q in orders])
        one = np.broadcast_to(np.eye(sde.k), (len(ts), *psi.shape[1:]))
        return Coefficients(
            ts, ts[:-1], psi, constants.reshape(*constants.shape, *(1,) * (psi.ndim - 1)) * step[:, None],
            noise=np.zeros_like(psi), record_u=np.zeros_like(one), record_eps=one, orders=orders,
        )  # fmt: skip


class DPMSolver(AbstractTableSampler):
    """DPM-Solver++ 2M and 3M (Lu et al. 2022, arXiv 2211.01095): polynomials in the log-SNR of the data prediction.

    In `x = log r_τ/r_t / log r_s/r_t`, r the `noise_level`, a step is `u_s = Ψ̂(s,t) u_t + Σ_j Σ_n ℓ_jn M_n D_j`, ℓ_jn the
    coefficients of Lagrange's polynomials and `M_n = ∫_s^t ½ Ψ̂(s,τ) GGᵀΣ⁻¹ψ xⁿ dτ`, of which theirs are approximations:
    2M takes `M_1 = M_0/2`, and 3M half of M_2, so that both are of order 2.

    `order`: 1 (DDIM), 2 or 3 nodes. Raises `ValueError` for another, and for a process with a noise level per frequency.
    """

    order: int = eqx.field(default=2, static=True, converter=as_index)
    """Number of nodes, 1 (DDIM), 2 or 3."""

    def __check_init__(self) -> None:
        _check_order(self, 3)

    def nfe(self, steps: int) -> int:
        return steps

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        steps = LogSnrSteps.of(sde, check_grid(sde, ts), self.order)
        moments = steps.moments.copy()
        moments[:, 2:] /= 2
        return steps.table(steps.weights(steps.nodes, moments, moments[:, 0] / 2))


class UniPC(AbstractTableSampler):
    """UniPC (Zhao et al. 2023, arXiv 2302.04867) on the data prediction, with its corrector, at no call more.

    The predictor of `order` nodes is that of `DPMSolver` with exact moments, the corrector has the node s too; where there
    are two nodes, either takes `M_1 = B/2`, with `B = M_0` ("bh2") or `B = M_0 h/(1 − e^{−h})`, `h = log r_t/r_s` ("bh1").

    `order`: 1, 2 or 3 nodes of the predictor; `variant`: "bh1" or "bh2". Raises `ValueError` for others, and for a process
    with a noise level per frequency.
    """

    order: int = eqx.field(default=2, static=True, converter=as_index)
    """Number of nodes of the predictor, 1 to 3."""
    variant: Literal["bh1", "bh2"] = eqx.field(default="bh2", static=True)
    """What B is, where there are two nodes."""

    def __check_init__(self) -> None:
        _check_order(self, 3)
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"UniPC: variant={self.variant!r} must be 'bh1' or 'bh2'")

    def nfe(self, steps: int) -> int:
        return steps

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        steps = LogSnrSteps.of(sde, check_grid(sde, ts), self.order)
        half = steps.moments[:, 0] / 2
        if self.variant == "bh1":
            half = half * (steps.h / -np.expm1(-steps.h)).reshape(-1, *(1,) * (half.ndim - 1))
        with_s = np.concatenate([steps.panels.ts[1:, None], steps.nodes], 1)
        predictor, corrector = (steps.weights(nodes, steps.moments, half) for nodes in (steps.nodes, with_s))
        return steps.table(corrected_for_free(steps.psi_hat, predictor, corrector))


class AnalyticStart(AbstractTableSampler):
    """The first step without a call, as data `N(0, data_std²)` would take it, exactly; the others by another sampler.

    At the horizon a state tells next to nothing of the data, and the network says so: the analytic first step (AFS) of
    Dockhorn et al. 2022 (GENIE, arXiv 2210.05475), by the flow (at λ of the sampler) of `Residual` with N = 0.

    `sampler`: the others'. `data_std`: a number, or a spectrum of the process's frequencies; without it that of the sampler,
    or 0.5.

    Raises `ValueError` for a grid of one step, and a sampler that itself starts before its first call (`SSCS`).
    """

    sampler: AbstractTableSampler = eqx.field(static=True)
    """Of all steps but the first."""
    data_std: Any = eqx.field(default=None, static=True, converter=as_static)
    """The scale of the data: a number, or a spectrum of the process's frequencies; None: the sampler's."""

    @property
    def told_unit(self) -> Any:
        return self.sampler.told_unit if self.data_std is None else self.data_std

    def for_data(self, shape: tuple[int, ...]) -> "AnalyticStart":
        return dataclasses.replace(self, sampler=self.sampler.for_data(shape))

    def nfe(self, steps: int) -> int | None:
        return self.sampler.nfe(steps - 1)

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        ts = check_grid(sde, ts)
        if len(ts) < 3:
            raise ValueError("AnalyticStart: a grid of one step leaves none for the sampler")
        table = self.sampler.coefficients(sde, ts[1:])
        if table.start is not None:
            raise ValueError(f"AnalyticStart: {self.sampler} starts before its first call itself")
        first = Residual(sde, ts[:2], getattr(self.sampler, "lam", 0.0), self.noise_unit)
        return dataclasses.replace(table, start=(first.psi_hat[0], first.noise[0]))


@dataclasses.dataclass(frozen=True)
class LogSnrSteps:
    """The steps of a grid in the log-SNR."""

    panels: Panels
    nodes: np.ndarray
    """The times of each step's history, `(steps, order)`."""
    h: np.ndarray
    """`log r_t/r_s`, `(steps,)`."""
    R: np.ndarray
    psi_hat: np.ndarray
    """`Ψ̂(s,t)`, `(steps, *#dims, k, k)`."""
    moments: np.ndarray
    """`M_n` on `Ψ(t, 0) D`, `(steps, order + 1, *#dims, k, k)`."""

    @staticmethod
    def of(sde: AbstractLinearSDE, ts: np.ndarray, order: int) -> LogSnrSteps:
        panels = Panels(sde, ts, lam=0.0)
        if panels.rank:
            raise ValueError(
                f"{type(sde).__name__} has a noise level per frequency, and this sampler needs one; use GDDIM"
            )
        r = noise_level(sde, ts)
        if not np.all((r > 0) & np.isfinite(r)):
            raise ValueError(f"the noise level is {r[0]:.3g} … {r[-1]:.3g} on this grid, and must be > 0 and finite")
        R, h = panels.at(sde.noise_factor, ts), np.log(r[:-1] / r[1:])
        psi_hat = R[1:] @ inverse(R[:-1])
        Q = panels.to_nodes(R[1:]) @ inverse(panels.at(sde.noise_factor, panels.tau))
        Q = Q @ panels.psi(panels.tau, panels.times_at_nodes(ts[:-1]))
        rate = np.einsum("ij,mj...->mi...", DIFFERENTIATE, Q)
        x = np.log(panels.to_nodes(r[:-1]) / noise_level(sde, panels.tau)) / panels.to_nodes(h)
        powers = (x[..., None] ** np.arange(1, order + 1))[..., None, None]
        moments = np.concatenate([
            (panels.psi(ts[1:], ts[:-1]) - psi_hat)[:, None], -panels.integrate(powers * rate[:, :, None])
        ], 1)  # fmt: skip
        return LogSnrSteps(panels, history_nodes(ts, order), h, R, psi_hat, moments)

    def weights(self, nodes: np.ndarray, moments: np.ndarray, half: np.ndarray) -> np.ndarray:
        """Those of `m_j = Ψ(t_j, 0) D_j`, `(steps, nodes, k, k)`; NaN is an absent node; `half` is M_1 where there are two."""
        sde, t = self.panels.sde, np.broadcast_to(self.panels.ts[:-1, None], nodes.shape)
        present = ~np.isnan(nodes)
        times = np.where(present, nodes, t)
        x = np.log(noise_level(sde, t) / noise_level(sde, times)) / self.h[:, None]
        found = np.zeros((*nodes.shape, sde.k, sde.k))
        for i, here in enumerate(present):
            use = moments[i, : here.sum()].copy()
            if here.sum() == 2:
                use[1] = half[i]
            coefficients = np.linalg.inv(np.vander(x[i, here], increasing=True))  # of ℓ_j, over powers then nodes
            found[i, here] = np.einsum("nj,nab->jab", coefficients, use)
        return found @ self.panels.psi(t, times)

    def table(self, weights: np.ndarray) -> Coefficients:
        ts, k = self.panels.ts, self.psi_hat.shape[-1]
        return Coefficients(
            ts, ts[:-1], self.psi_hat, weights, noise=np.zeros_like(self.psi_hat),
            record_u=np.broadcast_to(np.eye(k), self.R.shape), record_eps=-self.R, orders=count(self.nodes),
            record_data=self.panels.psi(ts, np.zeros_like(ts))[..., :1],
        )  # fmt: skip


def _check_order(sampler: Any, most: int) -> None:
    if type(sampler.order) is not int or not 1 <= sampler.order <= most:
        raise ValueError(f"{type(sampler).__name__}: order={sampler.order} must be 1 to {most}")
