"""Integrals over the steps of a grid, to float64: panels on which the process is resolved, and `∫ ℓ_j dQ` over them.

Every weight of every sampler here is a Stieltjes integral `∫_t^s ℓ_j(τ) dQ(τ)` of a Lagrange polynomial against a smooth
matrix function Q that the process knows in closed form. Integrated by parts it needs Q alone, no GGᵀ and no Σ⁻¹.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gddim.sde.base import AbstractLinearSDE, positions
from gddim.sde.collocation import DEPTH, DIFFERENTIATE, GAUSS_NODES, GAUSS_WEIGHTS, NODES, unresolved
from gddim.sde.host import on_host
from gddim.sde.linalg import triangular

Clock = Callable[[np.ndarray], np.ndarray]  # what polynomials are in, a rising function of time
AMPLIFICATION = 256.0  # times the rounding of a network in bfloat16 this is the whole of ε


def same(t: np.ndarray) -> np.ndarray:
    """Time itself as the clock."""
    return t


class Panels:
    """The steps of a grid, cut into panels `[lower, upper]` on each of which the process is a polynomial to 1e-13.

    Panels are Gauss–Legendre in y = √τ, in which VP's noise is smooth down to 0 and power-2 grids are uniform; what is
    rough (CLD's boundary layer) is bisected until it is resolved. They stand in order of step, then of rising time.
    """

    def __init__(
        self, sde: AbstractLinearSDE, ts: np.ndarray, lam: float, rough: Callable[[Panels], np.ndarray] | None = None
    ):
        """`rough` says, of panels that hold the process, which do not hold what else is made of it, `(panels,)`."""
        self.sde, self.ts, self.lam = sde, ts, lam
        self.rank = len(positions(sde))
        step = np.arange(len(ts) - 1)
        lower, upper = np.sqrt(ts[1:]), np.sqrt(ts[:-1])
        done: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for depth in range(DEPTH):
            self._place(step, lower, upper)
            coarse = self._unresolved() if rough is None else self._unresolved() | rough(self)
            halved = coarse & (depth < DEPTH - 1)
            done.append((step[~halved], lower[~halved], upper[~halved]))
            if not halved.any():
                break
            step, lower, upper = step[halved], lower[halved], upper[halved]
            middle = (lower + upper) / 2
            step, lower, upper = np.tile(step, 2), np.append(lower, middle), np.append(middle, upper)
        step, lower, upper = (np.concatenate(parts) for parts in zip(*done, strict=True))
        order = np.lexsort((lower, step))
        self._place(step[order], lower[order], upper[order])
        self.starts = np.searchsorted(self.step, np.arange(len(ts) - 1))

    def _place(self, step: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
        y = (lower + upper)[:, None] / 2 + (upper - lower)[:, None] / 2 * GAUSS_NODES
        self.step, self.lower, self.upper = step, lower, upper
        self.tau = y**2
        self.slope = (upper - lower)[:, None] * y  # dτ/dξ on the panel, ξ in [-1, 1]

    def _unresolved(self) -> np.ndarray:
        """Which panels do not yet hold Ψ, R and R⁻¹ (and, for λ > 0, the rate of Ψ̂) as polynomials."""
        R = self.at(self.sde.noise_factor, self.tau)
        local = self.local_psi()
        scaled = self.to_nodes(self.at(self.sde.noise_factor, self.ts[1:])) @ np.linalg.inv(R)
        rough = np.zeros(len(self.tau), bool)
        for values in (local, local @ R, scaled):
            rough |= unresolved(values)
        if self.lam > 0:
            rate = np.abs(self.log_rate()).sum(-1)
            rough |= (self.lam**2 * rate > 1).any(tuple(range(1, rate.ndim)))
        return rough

    def local_psi(self) -> np.ndarray:
        """`Ψ(lower, τ)` at the nodes of each panel."""
        return self.psi(np.repeat((self.lower**2)[:, None], NODES, 1), self.tau)

    def at(self, fn: Callable[..., np.ndarray], *times: np.ndarray) -> np.ndarray:
        """A method of the process at arrays of times, `(*times.shape, *#dims, k, k)` with all of `#dims` present."""
        values, batch = on_host(fn, *times), times[0].shape
        absent = self.rank + len(batch) + 2 - values.ndim
        return values.reshape(batch + (1,) * absent + values.shape[len(batch) :])

    def psi(self, t: np.ndarray, s: np.ndarray) -> np.ndarray:
        return self.at(self.sde.transition, t, s)

    def to_nodes(self, per_step: np.ndarray) -> np.ndarray:
        """`(steps, …)` to what broadcasts against values at the nodes, `(panels, 1, …)`."""
        return per_step[self.step][:, None]

    def times_at_nodes(self, per_step: np.ndarray) -> np.ndarray:
        """A time of every step at each of its nodes, `(panels, nodes)`."""
        return np.broadcast_to(self.to_nodes(per_step), self.tau.shape)

    def log_rate(self) -> np.ndarray:
        """`½ M dτ/dξ`, with `M = R⁻¹GGᵀR⁻ᵀ`, at the nodes: `Y⁻¹ dY/dξ` for `Y = Ψ(lower, τ) R_τ`; symmetric."""
        Y = self.local_psi() @ self.at(self.sde.noise_factor, self.tau)
        rate = np.linalg.solve(Y, np.einsum("ij,mj...->mi...", DIFFERENTIATE, Y))
        return (rate + rate.swapaxes(-1, -2)) / 2

    def integrate(self, values: np.ndarray) -> np.ndarray:
        """`∫_s^t values dξ` per step, for values at the nodes `(panels, nodes, …)`. Returns `(steps, …)`."""
        return np.add.reduceat(np.einsum("i,mi...->m...", GAUSS_WEIGHTS, values), self.starts, axis=0)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First panel of each step, and the one after its last."""
        return zip(self.starts, [*self.starts[1:], len(self.tau)], strict=True)

    def chained(
        self, from_lower: np.ndarray, whole: np.ndarray, root: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A matrix that obeys `Z(s, t) = Z(s, τ) Z(τ, t)`, from what it is on panels to what it is on steps.

        from_lower: `Z(lower, τ)` at the nodes; whole: `Z(lower, upper)`; root: B at the nodes, times the root of the
        quadrature's weight, or None where it is 0. Returns `Z(s, lower)` of each panel, `Z(s, t)` of each step, and of each the
        triangular factor of `∫_s^t Z(s, τ) B Bᵀ Z(s, τ)ᵀ dξ`, which sums squares and cannot cancel.
        """
        one = np.broadcast_to(np.eye(whole.shape[-1]), whole.shape[1:])
        before, steps = np.empty_like(whole), np.empty((len(self.starts), *whole.shape[1:]))
        factors = np.zeros_like(steps)
        for step, (start, stop) in enumerate(self.spans()):
            Z, factor = one, factors[step]
            for p in range(start, stop):
                before[p] = Z
                if root is not None:
                    increments = np.moveaxis(Z @ from_lower[p] @ root[p], 0, -2)  # (*#dims, k, nodes, k)
                    factor = triangular(np.concatenate([factor, increments.reshape(*factor.shape[:-1], -1)], -1))
                Z = Z @ whole[p]
            steps[step], factors[step] = Z, factor
        return before, steps, factors

    def stieltjes(
        self, nodes: np.ndarray, Q: np.ndarray, Q_s: np.ndarray, Q_t: np.ndarray, clock: Clock = same
    ) -> np.ndarray:
        """`∫_t^s ℓ_j(τ) dQ(τ)` for every step and every column j of `nodes` `(steps, q)`; NaN marks an absent node.

        Q: at the panels' nodes; Q_s, Q_t: at the steps' ends; ℓ_j are polynomials in the `clock`. Returns
        `(steps, q, *#dims, k, k)`.
        """
        nodes, at_nodes = clock(nodes), clock(self.tau)
        at_s, _ = lagrange(nodes, clock(self.ts[1:])[:, None])
        _, slope = lagrange(nodes[self.step], at_nodes)
        expand = (...,) + (None,) * (Q.ndim - 2)
        integrand = (slope * np.einsum("ij,mj->mi", DIFFERENTIATE, at_nodes)[:, :, None])[expand] * (
            Q - self.to_nodes(Q_t)
        )[:, :, None]
        return at_s[:, 0][expand] * (Q_s - Q_t)[:, None] + self.integrate(integrand)


def lagrange(nodes: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Lagrange basis and its derivative: nodes `(n, q)` (NaN marks an absent one), at `(n, p)` → two `(n, p, q)`."""
    present = ~np.isnan(nodes)
    value, slope = np.ones((*at.shape, nodes.shape[1])), np.zeros((*at.shape, nodes.shape[1]))
    for j in range(nodes.shape[1]):
        for other in range(nodes.shape[1]):
            pair = (present[:, j] & present[:, other])[:, None] & (j != other)
            gap = np.where(pair, nodes[:, [j]] - nodes[:, [other]], 1)
            factor = np.where(pair, (at - nodes[:, [other]]) / gap, 1)
            slope[..., j] = slope[..., j] * factor + value[..., j] * pair / gap
            value[..., j] *= factor
    return value * present[:, None], slope * present[:, None]


def history_nodes(ts: np.ndarray, order: int, clock: Clock = same) -> np.ndarray:
    """The times `t_i, t_{i−1}, …` of each step's history, `(steps, order)`; NaN where there is none, or none of use.

    A polynomial on the nodes multiplies what the calls differ by at random, be it rounding or a network's, by up to
    `Σ_j |ℓ_j(s)|`. From the latest on, a node that takes this beyond AMPLIFICATION is passed over.
    """
    index = np.arange(len(ts) - 1)[:, None] - np.arange(order)
    nodes = np.where(index < 0, np.nan, ts[np.maximum(index, 0)])
    for j in range(1, order):
        with np.errstate(divide="ignore", invalid="ignore"):  # times that the clock does not tell apart
            value, _ = lagrange(clock(nodes[:, : j + 1]), clock(ts[1:])[:, None])
        nodes[~(np.abs(value[:, 0]).sum(1) <= AMPLIFICATION), j] = np.nan
    return nodes


def with_end(ts: np.ndarray, nodes: np.ndarray, clock: Clock = same) -> np.ndarray:
    """The corrector's nodes, `(steps, order + 1)`: the step's end s, and those of its history that the clock tells from s."""
    s = ts[1:, None]
    return np.concatenate([s, np.where(clock(nodes) == clock(s), np.nan, nodes)], 1)


def count(nodes: np.ndarray) -> np.ndarray:
    """How many nodes each step has, `(steps,)`."""
    return (~np.isnan(nodes)).sum(1)


def corrected_for_free(psi: np.ndarray, weights: np.ndarray, corrector: np.ndarray) -> np.ndarray:
    """The weights that also redo the step before with the record that has come since: UniPC's corrector, for no call more.

    After the call at the predicted û_i, `u_i = û_i + Σ_j (C_j − W_j) h_j` is what the corrector of the last step makes of
    its start and the new record: W the weights of that step and C those of its corrector, the new record first. The step
    from u_i on, `Ψ u_i + Σ_j W_j h_j`, is then one from û_i, whose weights these are.

    psi, weights, corrector: `(n, …)`, `(n, q, …)` and `(n, q+1, …)`. Returns `(n, q+1, …)`.
    """
    none = np.zeros_like(weights[:, :1])
    moved = np.concatenate([weights, none], 1)
    moved[1:] += psi[1:, None] @ (corrector - np.concatenate([none, weights], 1))[:-1]
    return moved
