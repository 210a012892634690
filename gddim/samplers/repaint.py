"""Steps that are taken again from noise put back: RePaint's going back in time, as a table for any linear SDE."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import numpy as np

from gddim.samplers.adams import GDDIM
from gddim.samplers.base import Coefficients
from gddim.samplers.solver import AbstractTableSampler
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.host import as_index, on_host
from gddim.sde.linalg import transpose, triangular


class RePaint(AbstractTableSampler):
    """Each step from t to s several times, the process going back from s to t in between (arXiv 2201.09865).

    A step is of order 1 on the predicted data, and the way back is the process's own transition,

        `u_t = Ψ(t,s) u_s + Q^{1/2} ξ`,   `Q = Σ_t − Ψ(t,s) Σ_s Ψ(t,s)ᵀ`.

    What was known of an image and what was filled in hear of each other on it: with the denoiser of
    `gddim.guidance.Measured(…, by="replacement")` it takes away most of that method's bias. Of an exact denoiser alone it
    corrects what the steps before did wrong.

    `repeats`: how often each step is taken, a call each time; 1 does not go back.
    `lam`: λ of the steps, 1 the reverse SDE as in RePaint, 0 the flow. Raises `ValueError` for `repeats` < 1 and λ < 0.

    >>> RePaint(repeats=4).nfe(steps=5)
    20
    """

    repeats: int = eqx.field(default=4, static=True, converter=as_index)
    """How often each step is taken, a network call each time."""
    lam: float = eqx.field(default=1.0, static=True, converter=float)
    """λ ≥ 0 of the steps: 1 is the reverse SDE, 0 the probability flow."""

    def __check_init__(self) -> None:
        if type(self.repeats) is not int or self.repeats < 1:
            raise ValueError(f"RePaint: repeats={self.repeats} must be a whole number of at least 1")
        if not 0 <= self.lam < np.inf:
            raise ValueError(f"RePaint: lam={self.lam} must be ≥ 0")

    def nfe(self, steps: int) -> int:
        return self.repeats * steps

    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        table = GDDIM(1, self.lam, interpolate="data").coefficients(sde, ts)

        def at(fn: Any, *times: np.ndarray) -> np.ndarray:
            values = on_host(fn, *times)
            return values.reshape(len(values), *(1,) * (table.psi.ndim - values.ndim), *values.shape[1:])

        back, sigma = at(sde.transition, table.ts[:-1], table.ts[1:]), at(sde.covariance, table.ts)
        after = table.noise @ transpose(table.noise) - sigma[1:]
        returned = _factor(sigma[:-1] + back @ after @ transpose(back))

        n = len(table.times)
        step = np.repeat(np.arange(n), self.repeats)
        goes, nodes = np.append(step[1:] == step[:-1], False), np.append(step, n)

        def rows(onwards: np.ndarray, returning: np.ndarray) -> np.ndarray:
            return np.where(goes.reshape(-1, *(1,) * (onwards.ndim - 1)), returning[step], onwards[step])

        records = ("ts", "record_u", "record_eps", "record_data")
        found = {name: None if (each := getattr(table, name)) is None else each[nodes] for name in records}
        weights = rows(table.weights, back[:, None] @ table.weights)
        orders = None if table.orders is None else table.orders[step]
        return dataclasses.replace(
            table, times=table.times[step], psi=rows(table.psi, back @ table.psi), weights=weights,
            noise=rows(np.broadcast_to(table.noise, returned.shape), returned), orders=orders, **found,
        )  # fmt: skip


def _factor(S: np.ndarray) -> np.ndarray:
    """The lower triangular `L` with `L Lᵀ = S`, semidefinite to rounding."""
    values, vectors = np.linalg.eigh((S + transpose(S)) / 2)
    return triangular(vectors * np.sqrt(np.maximum(values, 0))[..., None, :])
