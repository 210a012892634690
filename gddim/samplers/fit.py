"""Tables that learn: times and weights such that a few network calls end where many do, for one network and process.

A table of few calls is fitted to a run of many calls of the same network, its teacher, from the same noises:

(a) the grid alone, by dynamic programming on what a step of order 1 misses of the teacher's path, as GITS does (Chen et al.
    2024, arXiv 2405.11326);
(b) times and weights, by gradients through the compiled loop. Times move in the clock of `band_grid`, and the float64 table
    moves with them; weights are corrections to it, of all the history, in units of what a step moves.

The loss is the mean square distance to the teacher's end, in units of `spectrum`. What is kept is the best of all that was
met, what it began with among it, on noises that no gradient saw: there a fit is never worse.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gddim.samplers.base import Coefficients, ProcessModel
from gddim.samplers.grids import Band, noise_level, spaced
from gddim.samplers.numbered import given
from gddim.samplers.solver import AbstractTableSampler, TableSolver
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.blurring import dct2
from gddim.sde.host import on_host
from gddim.sde.linalg import Array, inverse, product, transpose

POWERS = (1.0, 2.0)  # of the deviations whose sum a grid makes least: more evens them out
ANCHOR = 25  # gradient steps for which a table is taken as linear in its times
RATES = 0.03, 0.01  # Adam's, at first, of gaps and weights
SPREAD = 10.0  # of the means' and standard deviations' weight in the loss
FLOOR = 0.01  # of the spectrum, squared
PATIENCE = 8  # times that the best is looked for in vain
BETA1, BETA2 = 0.9, 0.99


class Pairs(NamedTuple):
    """Noises, and where the teacher takes them."""

    start: Array
    """States at the horizon, `(n, *dims, k, C)`."""
    end: Array
    """Data in pixels, `(n, *dims, C)`."""
    cond: PyTree = None
    """What conditions each, a tree of arrays with a sample a row, or None."""


@dataclasses.dataclass(frozen=True)
class Family:
    """The tables of a sampler on the grids between two times, in the form that a fit corrects.

    A record is the data that a call foresees, whole or less a multiple of u, and the weights `(n, n, *#dims, k, k)` are of all
    the history, in the first column.
    """

    sampler: AbstractTableSampler
    sde: AbstractLinearSDE
    t_max: float
    t_min: float
    clock: Band

    def times(self, gaps: np.ndarray) -> np.ndarray:
        """The grid whose steps in the clock are as `exp(gaps)`, `(n,)`."""
        steps = np.exp(gaps - gaps.max())
        shares = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
        return spaced(self.clock, self.sde, self.t_max, self.t_min, shares)

    def gaps(self, ts: np.ndarray) -> np.ndarray:
        """The inverse of `times`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(-np.diff(self.clock(noise_level(self.sde, ts))))

    def table(self, ts: np.ndarray) -> Coefficients:
        """The table on a grid. Raises `ValueError` for a sampler that adds noise, corrects by calls or interpolates ε."""
        table = self.sampler.coefficients(self.sde, ts)
        if table.record_data is None or table.corrector is not None or table.start is not None or np.any(table.noise):
            raise ValueError("it interpolates no data, adds noise, or makes more or fewer calls than steps")
        n, q = table.weights.shape[:2]
        latest = np.maximum(np.arange(n)[:, None] - np.arange(q), 0)
        weights = np.zeros((n, max(n, q), *table.psi.shape[1:]))
        weights[:, :q, ..., :1] = product(table.weights, table.record_data[latest])
        record_u, record_eps = self._records(ts, table.data_u)
        one = np.broadcast_to(np.eye(self.sde.k, 1), table.record_data.shape)
        return dataclasses.replace(
            table, weights=weights[:, :n], record_u=record_u, record_eps=record_eps, record_data=one, orders=None
        )

    def _records(self, ts: np.ndarray, data_u: Array | None) -> tuple[Array | None, Array | None]:
        """What ε tells of the data, `D = r²vᵀ(R⁻¹u − ε)`, in the first field; nothing where none of it is left."""
        with np.errstate(divide="ignore", invalid="ignore"):
            R_inv, v, square = reduction_at(self.sde, ts)
            of_eps = -square * transpose(v)
            of_u = -of_eps @ R_inv
        if not np.all(np.isfinite(of_u[:-1])):
            return None, None
        of_u = of_u if data_u is None else of_u + data_u
        rest = np.zeros((*of_u.shape[:-2], self.sde.k - 1, self.sde.k))
        first = lambda x: np.concatenate(
            [np.nan_to_num(np.broadcast_to(x, of_u.shape)), rest], -2
        )  # the last is not called
        return first(of_u), first(of_eps)

    def slopes(self, gaps: np.ndarray, h: float = 1e-4) -> Coefficients:
        """What the table's numbers change by with each gap, `(n, …)`, by central differences."""

        def moved(sign: int) -> Coefficients:
            tables = [self.table(self.times(gaps + sign * one)) for one in h * np.eye(len(gaps))]
            return jax.tree.map(lambda *x: np.stack(x), *tables)

        return jax.tree.map(lambda above, below: (above - below) / (2 * h), moved(1), moved(-1))


def reduction_at(sde: AbstractLinearSDE, ts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`R⁻¹`, `v = R⁻¹ψ` and `r² = 1/vᵀv` at times, `(n, *#dims, k, k)`, `(…, k, 1)` and `(…, 1, 1)`."""
    R, psi = on_host(sde.noise_factor, ts), on_host(sde.transition, ts, np.zeros_like(ts))[..., :1]
    rank = max(R.ndim, psi.ndim)
    R, psi = (x.reshape(len(ts), *(1,) * (rank - x.ndim), *x.shape[1:]) for x in (R, psi))
    R_inv = inverse(R)
    v = R_inv @ psi
    return R_inv, v, 1 / (transpose(v) @ v)


def deviations(sde: AbstractLinearSDE, times: np.ndarray, data: np.ndarray) -> np.ndarray:
    """How far one step of order 1 from time i of a path ends from its state at time j, `(m, m)`, in units of the data.

    In the coordinates `R⁻¹u` a path moves by `∫ D dv`, and the step by `D_i (v_j − v_i)`. The miss is that of the noised
    data `r²vᵀR⁻¹u` that a state is equivalent to: root mean square over samples and dimensions.

    `times`: of the path, falling, `(m,)`; `data`: what was foreseen at all but the last, `(m − 1, n, *dims, C)`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        _, v, square = reduction_at(sde, times)
    moves, found = np.diff(v, axis=0), np.zeros((len(times), len(times)))
    between = np.concatenate([(data[:-1] + data[1:]) / 2, data[-1:]])
    for i in range(len(times) - 1):
        missed = between[i:] - data[i]
        for j in range(i + 1, len(times)):
            share = (square[j] * transpose(v[j]) @ moves[i:j])[..., 0, 0]  # (j − i, *#dims)
            share = share.reshape(len(share), *(1,) * (data.ndim - 1 - share.ndim), *share.shape[1:], 1)
            found[i, j] = np.sqrt(np.mean((share * missed[: j - i]).sum(0) ** 2))
    return found


def shortest(cost: np.ndarray, steps: int) -> np.ndarray:
    """The `steps + 1` rising indices from the first to the last over which the sum of `cost[i, j]` is least."""
    ahead = np.where(np.triu(np.ones_like(cost), 1) > 0, cost, np.inf)
    best, before = np.where(np.arange(len(cost)) == 0, 0.0, np.inf), []
    for _ in range(steps):
        ways = best[:, None] + ahead
        best = ways.min(0)
        before.append(ways.argmin(0))
    found = [len(cost) - 1]
    for back in reversed(before):
        found.append(int(back[found[-1]]))
    return np.array(found[::-1])


def spectrum(ends: np.ndarray) -> np.ndarray:
    """The unit of the loss: the root mean square of data `(n, *dims, C)` about their mean, at every frequency of the cosine
    basis for pictures and in every coordinate otherwise, relative to that over all; at least a tenth of it.

    Measured on the digits: with and without it the Fréchet distance of a table is the same to 0.01 (VP, 3 and 4 calls), and the
    median distance to the teacher's ends 3 % smaller with it.
    """
    values = np.asarray(_frequencies(jnp.asarray(ends)))
    power = np.mean((values - values.mean(0)) ** 2, 0)
    return np.sqrt(power / power.mean() + FLOOR)


def _frequencies(x: Array) -> Array:
    """Pictures `(n, H, W, C)` in the cosine basis; anything else as it is."""
    return jax.vmap(dct2)(x) if x.ndim == 4 else x


@eqx.filter_jit
def distance(model: ProcessModel, solver: TableSolver, pairs: Pairs, unit: Array) -> Array:
    """The mean square distance of the ends to the teacher's in units `(*dims, C)`, and SPREAD times that of their means and
    standard deviations over the pairs: what is nearest alone is a mean of what may be, and has too little spread.
    """
    key = jax.random.key(0)  # unused: no noise is added
    one = lambda u, cond: model.sde.project(solver(given(model, cond), u, key).state)
    ours, theirs = (_frequencies(x) / unit[None] for x in (jax.vmap(one)(pairs.start, pairs.cond), pairs.end))
    moments = [(x.mean(0), jnp.sqrt(x.var(0) + 1e-6)) for x in (ours, theirs)]
    spread = sum(jnp.mean((a - b) ** 2) for a, b in zip(*moments, strict=True))
    return jnp.mean((ours - theirs) ** 2) + SPREAD * spread


def beside(anchor: Coefficients, slopes: Coefficients, gaps: Array) -> Coefficients:
    """The table at the gaps of the anchor, which has no noise, plus `gaps` `(n,)`: to first order, see `slopes`."""
    table = jax.tree.map(lambda x, slope: x + jnp.tensordot(gaps, slope, 1), anchor, slopes)
    return dataclasses.replace(table, noise=np.zeros(table.noise.shape))  # 0, and not traced as if it were more


class Moves(NamedTuple):
    """What gradients change."""

    gaps: Array
    """Of times, `(n,)`."""
    weights: Array
    """Of the data, `(n, n, k)`: of each step, the latest call's first."""


def corrected(table: Coefficients, scale: Array, weights: Array) -> Coefficients:
    """A table with corrections to its weights, `(n, n, k)`, in units of `scale` `(n, *#dims, k, 1)`."""
    n, k, dims = len(weights), weights.shape[-1], (1,) * (table.psi.ndim - 3)
    known = np.tril(np.ones((n, n), weights.dtype))[..., None]  # a step has the history of those before
    first = np.eye(1, k, dtype=weights.dtype).reshape(1, 1, *dims, 1, k)
    more = (weights * known).reshape(n, n, *dims, k, 1) * scale[:, None] * first
    return dataclasses.replace(table, weights=table.weights + more)


@eqx.filter_jit
def _descend(
    model: ProcessModel, sde: AbstractLinearSDE, anchor: Coefficients, slopes: Coefficients, scale: Array,
    moves: Moves, adam: Any, rate: Array, pairs: Pairs, unit: Array,
) -> tuple[Moves, Any, Array]:  # fmt: skip
    """One step of Adam; the rate is a share of `RATES`."""

    def loss(moves: Moves) -> Array:
        table = beside(anchor, slopes, moves.gaps)
        return distance(model, TableSolver.of(corrected(table, scale, moves.weights), sde), pairs, unit)

    value, slope = jax.value_and_grad(loss)(moves)
    count, mean, square = adam
    count = count + 1
    mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, mean, slope)
    square = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g**2, square, slope)

    def moved(x: Array, m: Array, v: Array, most: float) -> Array:
        return x - rate * most * (m / (1 - BETA1**count)) / (jnp.sqrt(v / (1 - BETA2**count)) + 1e-8)

    return Moves(*map(moved, moves, mean, square, RATES)), (count, mean, square), value


class Fitted(NamedTuple):
    """What a fit found, and the losses on noises that no gradient saw."""

    table: Coefficients
    default: float
    """Of the sampler on its grid."""
    grid: float
    """On the best grid, by dynamic programming."""
    fitted: float
    steps: int
    """Gradient steps that were taken."""


def fit(
    model: ProcessModel,
    family: Family,
    ts: np.ndarray,
    path: tuple[np.ndarray, np.ndarray],
    train: Pairs,
    held: Pairs,
    steps: int = 400,
    batch: int = 64,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    put: Callable[[Any], Any] = lambda pairs: pairs,
    progress: Callable[[int, float], object] = lambda step, loss: None,
) -> Fitted:
    """Fit a table of as many calls as the grid `ts`, the sampler's own, has steps.

    `model`: the network through the family's process; `path`: the teacher's times, `(m,)`, and what it foresaw at all but the
    last, `(m − 1, n, *dims, C)`; `train`, `held`: pairs of the teacher, those of the gradients and others; `steps`, `batch`:
    of Adam, whose rate falls to 0 with the steps or the `seconds`, whichever pass first; `clock`: of these, the same on all
    processes; `put`: pairs onto devices.

    Raises `ValueError` for a sampler whose table is not corrected (see `Family.table`).
    """
    unit, began = spectrum(np.asarray(train.end)), clock()
    among = lambda pairs, rows: put(jax.tree.map(lambda x: x[rows], pairs))
    some = [among(held, slice(i, i + batch)) for i in range(0, len(held.end), batch)]

    def measure(table: Coefficients) -> float:
        solver = TableSolver.of(table, family.sde)
        return float(np.mean([distance(model, solver, pairs, unit) for pairs in some]))

    first = family.table(ts)
    cost = deviations(family.sde, *path)
    found = [(measure(first), ts)]
    for power in POWERS:
        grid = path[0][shortest(cost**power, len(ts) - 1)]
        found.append((measure(family.table(grid)), grid))
    default, (on_grid, ts) = found[0][0], min(found, key=lambda each: each[0])
    gaps, best = family.gaps(ts), (on_grid, family.table(ts))
    scale = np.abs(best[1].weights[..., :1].sum(1))
    scale = np.maximum(scale, 0.1 * scale.max(-2, keepdims=True))
    n = len(gaps)
    moves = Moves(jnp.zeros(n), jnp.zeros((n, n, family.sde.k)))
    nothing = jax.tree.map(jnp.zeros_like, moves)
    adam, rng, since, step = (jnp.zeros(()), nothing, nothing), np.random.default_rng(0), 0, 0
    while step < steps and since < PATIENCE:
        anchor, slopes = family.table(family.times(gaps)), family.slopes(gaps)
        for _ in range(ANCHOR):
            done = max(step / steps, (clock() - began) / seconds)
            pairs = among(train, rng.integers(len(train.end), size=batch))
            rate = jnp.asarray((1 + math.cos(math.pi * min(done, 1))) / 2)
            moves, adam, _ = _descend(model, family.sde, anchor, slopes, scale, moves, adam, rate, pairs, unit)
            step += 1
        gaps = gaps + np.asarray(moves.gaps, np.float64)
        moves = moves._replace(gaps=jnp.zeros(n))
        table = corrected(family.table(family.times(gaps)), scale, np.asarray(moves.weights, np.float64))
        value, since = measure(table), since + 1
        if value < best[0]:
            best, since = (value, table), 0
        progress(step, value)
        if clock() - began > seconds:
            break
    return Fitted(best[1], default, on_grid, best[0], step)
