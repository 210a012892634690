"""Generalised DDIM: exponential Adams methods for any linear SDE, deterministic or not, on ε or on the data prediction."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import equinox as eqx
import numpy as np

from gddim.samplers.base import Coefficients
from gddim.samplers.contraction import Contraction
from gddim.samplers.grids import DATA_STD, check_grid, noise_level, scaled
from gddim.samplers.quadrature import Clock, Panels, corrected_for_free, count, history_nodes, same, with_end
from gddim.samplers.residual import Residual
from gddim.samplers.solver import AbstractTableSampler
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.collocation import unresolved
from gddim.sde.host import as_index
from gddim.sde.linalg import as_static, inverse

GAIN = 2.0  # of the prediction's error by a correction, where data are a point; for others it is less


class GDDIM(AbstractTableSampler):
    """gDDIM (Zhang, Tao, Chen, ICLR 2023, arXiv 2206.05564) of any order, in both interpolations, for any λ.

    With Ψ̂ the transition matrix of `F + (1+λ²)/2 GGᵀΣ⁻¹` (at λ = 0, `Ψ̂(s,t) = R_s R_t⁻¹`), ℓ_j the Lagrange basis on the
    last `order` times, `m_j = u_j − R_j ε_j` and `P = λ² ∫_s^t Ψ̂(s,τ) GGᵀ Ψ̂(s,τ)ᵀ dτ`, a step t → s is

        interpolate="eps":   u_s = Ψ(s,t) u_t + Σ_j ∫_t^s ℓ_j(τ) d[Ψ(s,τ) Ψ̂(τ,t) R_t] ε_j + P^{1/2} ξ
        interpolate="data":  u_s = Ψ̂(s,t) u_t + Σ_j ∫_t^s ℓ_j(τ) d[Ψ̂(s,τ) Ψ(τ,t_j)] m_j + P^{1/2} ξ

    Both equal gDDIM's Eq. 22 at order 1: DDIM for VP at λ = 0, DDPM's ancestral sampler at λ = 1. On data that are one
    point both are exact in law at any λ and any number of steps. For ε with λ > 0 this needs the history to be what the
    network would have said had the noise drawn since been there from the start: `ε_j ← Z ε_j + R_s⁻¹ P^{1/2} ξ`,
    `Z = R_s⁻¹ Ψ̂(s,t) R_t`, after every step. The corrector adds the node s, with ε at the predicted state (Adams–Moulton,
    PECE: two calls a step). The first `order − 1` steps use the orders that their history allows, and a time too close to
    a later one is passed over (`history_nodes`): a table's `orders` says how many nodes each step has.

    Correcting ε multiplies the error of the prediction, whatever its cause, by up to `R_s⁻¹ C Z⁻¹` in units of the noise,
    C the weight of the node s (its norm for CLD over 5 steps: 1e2 at λ = 0, 2e4 at λ = 1). A correction that multiplies
    it by more than GAIN would spoil what it should mend, in any precision (a mixture on CLD in 3 steps of order 2: an
    error of 8 where the prediction has 0.6): the prediction stands, and `corrected` in the table says so. For "data" the
    gain is at most about 1, and every step is corrected that ends where R is regular.

    For "data" a model with `.denoise` is asked for D itself, and a grid may start where Ψ(t, 0) = 0 (flow matching at 1).

    `order`: the number of nodes of the polynomials, 1 to 4; 1 is DDIM. The published code counts the degree, one less.
    `lam`: λ ≥ 0; 0 is the probability flow, without noise; 1 the reverse SDE; between and above, less or more noise.
    `corrector`: correct every step that it improves: one order more, for 2 network calls a step. "free" corrects a step once
    the call that follows it has come, with that record (`corrected_for_free`): one order more for no call, on a good grid
    (`band_grid`) up to half the error. Polynomials of "data" are then in `arctan(r / 2.5 s)`, r the noise level and s
    `data_std`, not in t, as those of "residual" are in its `Band`: at 5 to 10 calls less is extrapolated. Of few steps they
    reach less far: 2.1 s up to 8 of several fields, and up to 4 of one an s above 0.5, of images, counts as `√(0.5 s)`. With
    ε it diverges, and is refused.
    `interpolate`: "eps", the network's ε, "data", its data prediction, better for a `Denoiser` and for λ > 0, or "residual",
    what is left of that once the prediction for data N(0, data_std²) is taken off (`Residual`): exact for these, too.
    `data_std`: the scale of the data: what "residual" subtracts (→ 0 is "data", → ∞ for k = 1 "eps"), and a unit of noise
    levels. Without it 0.5; runs, and what `gddim.load` loads, take that of their data's shape, `data_scale`.

    Raises `ValueError` for an order outside 1 … 4, λ < 0, another `corrector` or `interpolate`, and a `data_std` ≤ 0.

    >>> sampler = GDDIM(order=3, interpolate="data")  # what samples a Denoiser in 10 calls
    >>> sampler.nfe(steps=10), GDDIM(order=2, corrector=True).nfe(steps=10)
    (10, 20)
    >>> table = sampler.coefficients(gddim.CLD(), gddim.power_grid(1.0, 1e-3, steps=10))
    >>> table.psi.shape, table.weights.shape  # (steps, k, k) and (steps, order, k, k), float64
    ((10, 2, 2), (10, 3, 2, 2))
    """

    order: int = eqx.field(default=3, static=True, converter=as_index)
    """Number of nodes, 1 (DDIM) to 4; the published code counts the polynomial's degree, one less."""
    lam: float = eqx.field(default=0.0, static=True, converter=float)
    """λ ≥ 0: 0 is the probability flow, 1 the reverse SDE."""
    corrector: bool | Literal["free"] = eqx.field(default=False, static=True)
    """Correct by the Adams–Moulton rule with the node s, where that improves: one order more, for twice the calls, or, for
    "free", with the next call's record: for no call more."""
    interpolate: Literal["eps", "data", "residual"] = eqx.field(default="eps", static=True)
    """What the polynomials interpolate: the network's ε, or its data prediction (better for a Denoiser, and for λ > 0), or
    what is left of that once the prediction for Gaussian data is taken off."""
    data_std: Any = eqx.field(default=None, static=True, converter=as_static)
    """The scale of the data: a number, or a spectrum of the process's frequencies; None where it is not told."""

    def __check_init__(self) -> None:
        if type(self.order) is not int or not 1 <= self.order <= 4:
            raise ValueError(f"GDDIM: order={self.order!r} must be 1, 2, 3 or 4")
        if not 0 <= self.lam < np.inf:
            raise ValueError(f"GDDIM: lam={self.lam} must be ≥ 0")
        if not isinstance(self.corrector, bool | np.bool_) and self.corrector != "free":
            raise ValueError(f"GDDIM: corrector={self.corrector!r} must be True, False or 'free'")
        if self.interpolate not in ("eps", "data", "residual"):
            raise ValueError(f"GDDIM: interpolate={self.interpolate!r} must be 'eps', 'data' or 'residual'")
        if self.corrector == "free" and self.interpolate == "eps":
            raise ValueError("GDDIM: corrector='free' diverges on ε; take interpolate='data' or 'residual'")
        if not (np.all(np.isfinite(self.noise_unit)) and np.all(np.asarray(self.noise_unit) > 0)):
            raise ValueError(f"GDDIM: data_std={self.data_std} must be > 0")

    def nfe(self, steps: int) -> int:
        return steps * (1 if self.corrector == "free" else 1 + self.corrector)

    def for_data(self, shape: tuple[int, ...]) -> GDDIM:
        return scaled(self, shape) if self.interpolate == "residual" or self.corrector == "free" else self

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        table = self.both(sde, ts)
        if self.corrector != "free":
            return table
        assert table.corrector is not None
        weights = corrected_for_free(table.psi, table.weights, table.corrector)
        return dataclasses.replace(table, weights=weights, corrector=None, corrector_noise=None, corrected=None)

    def both(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        """The table with the corrector apart also where it is free."""
        ts = check_grid(sde, ts, data=self.interpolate != "eps")
        if self.interpolate == "residual":
            return self._on_residual(Residual(sde, ts, self.lam, self.noise_unit), ts)
        clock = angle(sde, self.noise_unit, len(ts) - 1) if self.corrector == "free" else same
        steps = Steps.of(sde, ts, self.lam, self.order, clock)
        return self._on_data(steps) if self.interpolate == "data" else self._on_eps(steps)

    def _on_eps(self, steps: Steps) -> Coefficients:
        panels, R, z, psi = steps.panels, steps.R, steps.contraction, steps.psi
        Q = panels.psi(panels.times_at_nodes(panels.ts[1:]), panels.tau)
        Q = Q @ panels.at(panels.sde.noise_factor, panels.tau) @ z.to_t
        ends = R[1:] @ z.step, psi @ R[:-1]
        table: dict[str, Any] = dict(
            ts=panels.ts, times=panels.ts[:-1], psi=psi, weights=panels.stieltjes(steps.nodes, Q, *ends), noise=z.noise,
            record_u=np.zeros_like(steps.one), record_eps=steps.one, orders=count(steps.nodes),
        )  # fmt: skip
        with np.errstate(divide="ignore", invalid="ignore"):
            shift, corrected = inverse(R[1:]) @ z.noise, np.full(len(psi), False)
            if self.corrector:  # acts on the history as it is after the step
                corrector = panels.stieltjes(steps.nodes_with_s, Q, *ends) @ inverse(z.step)[:, None]
                gain = np.linalg.norm(inverse(R[1:]) @ corrector[:, 0], axis=(-2, -1))
                corrected = (gain <= GAIN).all(tuple(range(1, gain.ndim)))
        if panels.ts[-1] == 0 and not corrected[-1]:
            shift[-1] = 0  # no call follows, and R_0 may be singular
        if self.corrector:
            corrector[~np.isfinite(corrector)] = 0
            noise = z.noise - corrector.sum(1) @ shift
            table |= dict(corrector=corrector, corrector_noise=noise, corrected=corrected)
        if self.lam > 0:
            table |= dict(carry=steps.whole(z.step), shift=shift)
        return Coefficients(**table)

    def _on_data(self, steps: Steps) -> Coefficients:
        panels, R, z, ts = steps.panels, steps.R, steps.contraction, steps.panels.ts
        # a record is D in units of its own time, Ψ(t, 0) D, but where nothing is left of the data in those of 0: D itself
        gone = ~np.isfinite(steps.psi).reshape(len(steps.psi), -1).all(1)
        origin = lambda times: np.where(np.isin(times, ts[:-1][gone]), 0.0, times)
        start = origin(ts[:-1])

        def weights(nodes: np.ndarray) -> np.ndarray:
            """Ψ(·, t_j) folded in: m_j is the history, not D_j = Ψ(0, t_j) m_j."""
            t = np.broadcast_to(start[:, None], nodes.shape)
            return panels.stieltjes(nodes, Q, *ends, steps.clock) @ panels.psi(
                t, np.where(np.isnan(nodes), t, origin(nodes))
            )

        with np.errstate(divide="ignore", invalid="ignore"):
            psi_hat = steps.whole(R[1:] @ z.step @ inverse(R[:-1]))
            regular = np.isfinite(inverse(R[1:])).reshape(len(ts) - 1, -1).all(1)  # elsewhere there is no ε at s
        Q = panels.to_nodes(R[1:]) @ z.from_s @ inverse(panels.at(panels.sde.noise_factor, panels.tau))
        Q = Q @ panels.psi(panels.tau, panels.times_at_nodes(start))
        ends = panels.psi(ts[1:], start), psi_hat @ panels.psi(ts[:-1], start)
        corrector: dict[str, Any] = {}
        if self.corrector:
            corrector = dict(corrector=weights(steps.nodes_with_s), corrector_noise=z.noise, corrected=regular)
        told = not gone.any()  # by ε
        return Coefficients(
            ts=ts, times=ts[:-1], psi=psi_hat, weights=weights(steps.nodes), noise=z.noise, orders=count(steps.nodes),
            record_u=steps.one if told else None, record_eps=-R @ steps.one if told else None,
            record_data=panels.psi(origin(ts), np.zeros_like(ts))[..., :1], **corrector,
        )  # fmt: skip

    def _on_residual(self, steps: Residual, ts: np.ndarray) -> Coefficients:
        phi, k = steps.clock(ts), steps.sde.k
        nodes = history_nodes(phi, self.order)
        one_over_c, of_u, with_eps, of_eps = steps.records(ts)
        regular = np.asarray(np.isfinite(of_eps[1:]).reshape(len(ts) - 1, -1).all(1))
        if ts[-1] == 0 and not regular[-1]:
            one_over_c[-1] = of_u[-1] = with_eps[-1] = of_eps[-1] = 0  # no call follows, and R_0 is singular
        # N is the first field of a record
        first = lambda rows: np.concatenate([rows, np.zeros((*rows.shape[:-2], k - 1, rows.shape[-1]))], -2)
        columns = lambda nodes: np.concatenate([w := steps.weights(nodes), np.zeros((*w.shape[:-1], k - 1))], -1)
        corrector: dict[str, Any] = {}
        if self.corrector:
            corrector = dict(corrector=columns(with_end(phi, nodes)), corrector_noise=steps.noise, corrected=regular)
        told = bool(np.all(np.isfinite(of_eps[0])))
        return Coefficients(
            ts=ts, times=ts[:-1], psi=steps.psi_hat, weights=columns(nodes), noise=steps.noise, orders=count(nodes),
            record_u=first(with_eps) if told else None, record_eps=first(of_eps) if told else None,
            record_data=first(one_over_c), data_u=of_u, **corrector,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Steps:
    """What the weights of the steps of one grid are made of, at one λ."""

    panels: Panels
    R: np.ndarray
    """`R` at the times of the grid, `(steps + 1, *#dims, k, k)`."""
    psi: np.ndarray
    """`Ψ(s, t)`, `(steps, *#dims, k, k)`."""
    contraction: Contraction
    nodes: np.ndarray
    """The times of each step's history, `(steps, order)`: see `history_nodes`."""
    clock: Clock
    """What the polynomials are in."""

    @staticmethod
    def of(sde: AbstractLinearSDE, ts: np.ndarray, lam: float, order: int, clock: Clock) -> Steps:
        panels = Panels(sde, ts, lam, lambda panels: unresolved(clock(panels.tau)[..., None, None]))
        R = panels.at(sde.noise_factor, ts)
        return Steps(
            panels, R, panels.psi(ts[1:], ts[:-1]), Contraction(panels, R), history_nodes(ts, order, clock), clock
        )

    @property
    def nodes_with_s(self) -> np.ndarray:
        """Those of the corrector, `(steps, order + 1)`."""
        return with_end(self.panels.ts, self.nodes, self.clock)

    @property
    def one(self) -> np.ndarray:
        """The identity at the times of the grid."""
        return np.broadcast_to(np.eye(self.psi.shape[-1]), (len(self.R), *self.psi.shape[1:]))

    def whole(self, matrices: np.ndarray) -> np.ndarray:
        """`(steps, *#dims, k, k)` with all the dims of Ψ."""
        return np.broadcast_to(matrices, np.broadcast_shapes(matrices.shape, self.psi.shape))


def angle(sde: AbstractLinearSDE, data_std: Any, steps: int) -> Clock:
    """`arctan(r / 2.5 s)`, r the `noise_level` and s the scale of the data: of the lowest frequency both.

    Few steps are long, and polynomials should reach less far: up to 8 of several fields 2.1 stands for 2.5, and up to 4 of one
    field `√(0.5 s)` for an s above 0.5, which images have.
    """
    s = np.ravel(data_std)[0]
    if sde.k == 1 and steps <= 4:
        s = np.sqrt(s * min(s, DATA_STD))
    reach = (2.1 if sde.k > 1 and steps <= 8 else 2.5) * s

    def clock(t: np.ndarray) -> np.ndarray:
        absent = np.isnan(t)
        return np.where(absent, np.nan, np.arctan(noise_level(sde, np.where(absent, sde.horizon, t)) / reach))

    return clock
