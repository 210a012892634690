"""What every sampler is: it makes a solver for a process and a grid, and counts its own network calls."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Num, PRNGKeyArray

from gddim.samplers.base import Callback, Calls, Coefficients, DataModel, EpsFn, Last, ProcessModel, among, calls
from gddim.samplers.grids import DATA_STD, check_grid
from gddim.samplers.loop import Path, run
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.host import on_host
from gddim.sde.linalg import Array, aligned, namespace, product


class Solution(NamedTuple):
    """What a solver found."""

    state: Array
    """The state at the end, `(*dims, k, C)`."""
    calls: Any
    """The network calls that it took: an integer, traced where the sampler chooses its own steps."""
    path: Path | None = None
    """How it came about, where that was asked for."""


class AbstractSolver(eqx.Module):
    """A sampler on a process and a grid, made once for any number of states. A pytree: what it holds may be traced."""

    sde: eqx.AbstractVar[AbstractLinearSDE]

    @property
    def times(self) -> Any:
        """Those of its network calls, in order; None where the sampler chooses its own steps."""
        return None

    @abc.abstractmethod
    def solve(
        self, eps_fn: EpsFn, u: Array, key: PRNGKeyArray | None, path: bool, callback: Callback | None
    ) -> Solution:
        """The solution from the state `u`, which is of this process and of float32 at least."""

    def __call__(
        self,
        eps_fn: EpsFn,
        u: Num[Array, "..."],
        key: PRNGKeyArray | None = None,
        path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Carry one state to the end of the grid: see `sample` for the arguments and what is refused.

        With `path` the solution tells also the states, ε and data foreseen at every network call.
        """
        u = jnp.asarray(u)
        self.sde.check_state(u)
        check_model(eps_fn, self.sde)
        single = u.astype(jnp.float32) if u.dtype.itemsize < 4 else u
        solution = self.solve(eps_fn, single, key, path, callback)
        return solution._replace(state=solution.state.astype(u.dtype))


def check_model(eps_fn: EpsFn, sde: AbstractLinearSDE) -> None:
    """Raise `ValueError` for a model of another process, whose ε is in other coordinates; one by other means is the same.

    A process with numbers that are traced is not known, and not asked for.
    """
    if not isinstance(eps_fn, ProcessModel) or not isinstance(eps_fn.sde, AbstractLinearSDE):
        return
    if (
        any(isinstance(x, Tracer) for x in jax.tree.leaves((eps_fn.sde, sde)))
        or eqx.tree_equal(eps_fn.sde, sde) is True
    ):
        return
    ts = min(eps_fn.sde.horizon, sde.horizon) * np.array([sde.grid_end, 1e-3, 1e-2, 0.1, 0.5, 1.0])
    both = [(on_host(each.transition, ts, 0 * ts), on_host(each.noise_factor, ts)) for each in (eps_fn.sde, sde)]
    near = lambda theirs, ours: np.allclose(*aligned(theirs, ours, lead=1), rtol=1e-3)
    if eps_fn.sde.k != sde.k or not all(map(near, *both)):
        raise ValueError(
            f"eps_fn is a model of {eps_fn.sde!s:.80}, sampled as {sde!s:.80}: give one of this process, as "
            "gddim.through(sde, denoise) makes of any denoiser"
        )


class AbstractSampler(eqx.Module):
    """A sampler: a description that becomes a solver on a process and a grid. Fields are static."""

    @abc.abstractmethod
    def nfe(self, steps: int) -> int | None:
        """Network calls of that many steps, without the final denoising call; None if it chooses its own steps."""

    @abc.abstractmethod
    def solver(self, sde: AbstractLinearSDE, ts: Any, last: Last = "none") -> AbstractSolver:
        """The solver on the grid `ts`, with a `last` call to 0. A sampler that has its own grid, or chooses its steps,
        takes from `ts` what it needs. Raises `ValueError` for a grid that does not decrease within [0, horizon].
        """

    @property
    def told_unit(self) -> Any:
        """The `data_std` that it was told, its unit of noise levels; None where it has none."""
        return getattr(self, "data_std", None)

    @property
    def noise_unit(self) -> Any:
        """The `told_unit`, or 0.5."""
        return DATA_STD if self.told_unit is None else self.told_unit

    def for_data(self, shape: tuple[int, ...]) -> AbstractSampler:
        """This sampler for data of a shape: with their `data_scale` where it needs a scale and was told none."""
        return self


class AbstractTableSampler(AbstractSampler):
    """A sampler that is a table of numbers on any grid, read by the one loop: a new one writes `coefficients` and `nfe`.

    >>> class Euler(AbstractTableSampler):  # on the probability flow, du/dt = F u + ½ GGᵀR⁻ᵀ ε
    ...     def nfe(self, steps):
    ...         return steps
    ...
    ...     def coefficients(self, sde, ts):
    ...         F, half = sde.velocity_factors(ts[:-1])
    ...         h, one = np.diff(ts)[:, None, None], np.broadcast_to(np.eye(sde.k), (len(ts), *F.shape[1:]))
    ...         zero = np.zeros_like(one)
    ...         return Coefficients(ts, ts[:-1], one[1:] + h * F, (h * half)[:, None], zero[1:], record_u=zero, record_eps=one)
    >>> times, u = gddim.power_grid(1.0, 1e-3, steps=50), jnp.ones((2, 3))
    >>> ours, theirs = (gddim.sample(s, gddim.CLD(), jnp.multiply, u, times) for s in (Euler(), gddim.EulerMaruyama()))
    >>> bool(jnp.allclose(ours, theirs))
    True
    """

    @abc.abstractmethod
    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        """The table on the grid `ts`. Raises `ValueError` for a grid that does not decrease within [0, horizon]."""

    def solver(self, sde: AbstractLinearSDE, ts: Any, last: Last = "none") -> TableSolver:
        return TableSolver.of(self.coefficients(sde, ts), sde, last)


class TableSolver(AbstractSolver):
    """A table laid out as network calls, an argument of the compiled loop: solvers that make as many calls share one.

    A table that takes the data alone is laid out for a `DataModel` too, which the loop then asks for them.
    """

    sde: AbstractLinearSDE
    rows: Calls | None
    """Calls of ε; None where the grid starts with nothing left of the data."""
    data_rows: Calls | None
    """Calls of the data."""
    start: tuple[Array, Array] | None

    @staticmethod
    def of(table: Coefficients, sde: AbstractLinearSDE, last: Last = "none") -> TableSolver:
        """The solver of a table, which may be traced: a sample is differentiable in every number of it.

        >>> sde, u, times = gddim.VP(), jnp.ones((1, 2)), gddim.power_grid(1.0, 1e-3, steps=4)
        >>> table = gddim.GDDIM(order=2).coefficients(sde, times)
        >>> def size(times, weights):
        ...     moved = eqx.tree_at(lambda table: (table.times, table.weights), table, (times, weights))
        ...     return jnp.mean(TableSolver.of(moved, sde)(jnp.multiply, u).state ** 2)
        >>> of_times, of_weights = jax.grad(size, (0, 1))(jnp.asarray(table.times), jnp.asarray(table.weights))
        >>> of_times.shape, of_weights.shape
        ((4,), (4, 2, 1, 1))
        """
        rows = None if table.record_eps is None else calls(table, sde, last)
        data_rows = None if table.record_data is None else calls(table, sde, last, data=True)
        return TableSolver(sde, rows, data_rows, table.start)

    @property
    def nfe(self) -> Any:
        """Network calls, that of `last` included."""
        made = self._either.made
        return len(self._either.time) if made is None else made.sum()

    @property
    def times(self) -> Any:
        """Those of its network calls, in order."""
        time, made = self._either.time, self._either.made
        return time if made is None else time[made]

    @property
    def _either(self) -> Calls:
        """Both make as many calls, at the same times and with the same noise."""
        either = self.data_rows if self.rows is None else self.rows
        assert either is not None
        return either

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise, or may because its noise is traced."""
        noise = (self._either.noisy, *(() if self.start is None else self.start[1:]))
        return any(namespace(x) is jnp or bool(np.any(x)) for x in noise)

    def solve(
        self, eps_fn: EpsFn, u: Array, key: PRNGKeyArray | None, path: bool, callback: Callback | None
    ) -> Solution:
        rows = self.rows
        if self.data_rows is not None and isinstance(eps_fn, DataModel) and eps_fn.sde == self.sde:
            rows = self.data_rows
        if rows is None:
            raise ValueError(
                f"nothing is left of the data where this grid starts, and eps_fn is a {type(eps_fn).__name__}: give a model "
                "of this process with .denoise(u, t), as gddim.through(sde, denoise) or a gddim.Denoiser, or start below"
            )
        if key is None and self.stochastic:
            raise ValueError("this sampler adds noise, or is traced and may: give a key")
        first, rest = jax.random.split(jax.random.key(0) if key is None else key)
        if self.start is not None:
            psi, noise = (jnp.asarray(A, u.dtype) for A in self.start)
            u = product(psi, u) + product(noise, jax.random.normal(first, u.shape, u.dtype))
        if not (path or (callback and rows is self.rows)):  # what no call reads is not handed to the devices
            rows = dataclasses.replace(rows, other=None)
        state, way = run(rows, eps_fn, u, rest, path, callback)
        return Solution(state, self.nfe, way)


def sharing(solver: AbstractSolver) -> AbstractSolver:
    """The solver with its calls as the first of 64, 128, 256, …: those of other budgets then share its compiled program.

    The calls that are not made cost next to nothing; there is no path of them.
    """
    laid_out = lambda node: isinstance(node, Calls)
    room = lambda count: 64 * 2 ** max(0, math.ceil(math.log2(count / 64)))
    return jax.tree.map(lambda x: among(x, room(len(x.time))) if laid_out(x) else x, solver, is_leaf=laid_out)


def count_calls(sampler: AbstractSampler, steps: int, last: Last = "none") -> int:
    """NFE of `sample` with that many steps: network calls, the final denoising call included.

    Raises `ValueError` for a sampler that chooses its own steps.
    """
    count = sampler.nfe(steps)
    if count is None:
        raise ValueError(f"{sampler} chooses its own steps: only its solution tells the number of its calls")
    return count + (last != "none")


def sample(
    sampler: AbstractSampler,
    sde: AbstractLinearSDE,
    eps_fn: EpsFn,
    u: Num[Array, "..."],
    ts: Any,
    key: PRNGKeyArray | None = None,
    last: Last = "none",
    callback: Callback | None = None,
    return_path: bool = False,
) -> Any:
    """Carry one state `u` `(*dims, k, C)` at `ts[0]` to `ts[-1]`, or to 0 with a `last` call.

    `sampler`: a `GDDIM` or another of this package, or your own. Of a model that predicts data, few calls are spent best by
    `GDDIM(3, corrector="free", interpolate="data")` on a `band_grid`, both told the `data_scale` of images as `data_std`.
    `sde`: the process.
    `eps_fn`: `ε(u, t)`, takes and returns one state. Its result is cast to the precision of the loop, which is that of `u`
    but at least float32 (CLD multiplies rounding by e^8): a state in half precision is cast back at the end. A model of
    this very process with `.denoise(u, t)`, the data `(*dims, C)` in its basis, is asked for them where the sampler
    interpolates "data" or "residual": the loop then keeps one field, not k, and a grid may start where nothing is left of
    the data. Of a model that takes a condition, `gddim.guidance.guided(model, lambda D: D, cond)` is one of these.
    `u`: one state at `ts[0]`; `jax.vmap` maps over several.
    `ts`: the grid, a decreasing list of times in [0, horizon].
    `key`: draws the noise of λ > 0.
    `last`: one more network call from `ts[-1]` to 0, "euler" (a step of the reverse SDE without noise) or "data" (the data
    foreseen); "none" makes none.
    `callback`: called in the compiled loop after each step as `callback(u, data, t)`, with the new state, the data `(*dims, C)`
    that the step foresaw, in the basis of the process, and the time; the state that it returns goes on in its place.
    `return_path`: return also the `Path`: times, states, ε and data foreseen of every network call.

    Returns one state, of the shape and precision of `u`, or it and the path. Runs under `jit`, `vmap` and `shard_map`;
    coefficients are computed on the host and are arguments of the compiled loop, which is one program for every sampler of
    this package on grids that make the same number of calls, of ε or of the data. An Equinox module as `eps_fn` (`EpsModel`,
    `Denoiser`, your own) or one function compiles once, whatever arrays the module holds; a fresh lambda at each call, as
    `eps_fn` or `callback`, compiles anew, and it and the arrays that it closes over are kept alive.

    Raises `ValueError` for a state or an ε of a wrong shape, a state of integers, a model of another process, a grid that
    does not decrease within [0, horizon], a missing key, a `last` call after a grid that ends at 0, and a grid that starts
    where nothing is left of the data with another sampler or model.

    >>> sde, x0 = gddim.VP(), jnp.array([0.3, -0.8])
    >>> def eps_fn(u, t):  # the exact ε of data that are the one point x0
    ...     return (u - sde.transition(t, 0.0) * sde.lift(x0)) / sde.noise_factor(t)
    >>> u = sde.sample_prior(jax.random.key(0), (1, 2))
    >>> one_step = sample(gddim.GDDIM(order=1), sde, eps_fn, u, [1.0, 0.0])
    >>> bool(jnp.allclose(sde.project(one_step), x0, atol=1e-4))
    True
    """
    if not (isinstance(sampler, AbstractSampler) and isinstance(sde, AbstractLinearSDE)):
        given = f"{sampler!r:.60} and {sde!r:.60}"
        raise ValueError(f"sample takes a sampler and a process, as gddim.GDDIM(order=3) and gddim.CLD(), not {given}")
    solution = sampler.solver(sde, check_grid(sde, ts, data=True), last)(eps_fn, u, key, return_path, callback)
    return (solution.state, solution.path) if return_path else solution.state
