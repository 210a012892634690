"""A sampler is a table of numbers and the one loop that reads it."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num, PRNGKeyArray

from gddim.samplers.grids import check_grid
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.host import on_host
from gddim.sde.linalg import Array, product

EpsFn = Callable[[Array, Array], Array]
Last = Literal["none", "euler", "data"]
# A state with its k fields apart, each (*dims, C): products are then sums of whole arrays, which every backend fuses, and
# which XLA:CPU runs 8 to 90 times as fast as sums over an axis of length k.
Fields = list[Array]
SLOTS = 5  # history entries that the loop carries: order 4 and the corrector's


class Coefficients(eqx.Module):
    """The table of a sampler on a grid: float64 NumPy on the host, each array over the n steps first.

    A step from `t = ts[i]` to `s = ts[i+1]` calls ε once, records `h_0 = record_u u + record_eps ε(u, times[i])`, and sets
    `u_s = psi u + Σ_j weights_j h_j + noise ξ`, h_j the record of j calls before (those that do not exist have weight 0).
    A corrector then calls ε at s, records that as h_0, and sets `u_s = psi u + Σ_j corrector_j h_j + corrector_noise ξ`
    instead, with the same ξ; at a step that is not `corrected` the prediction stands, and the second call is for nothing.
    Between steps `h ← carry h + shift ξ`. All but `ts`, `times`, `orders` and `corrected` act as `A @ u`.
    """

    ts: np.ndarray
    """The grid, (n+1,)."""
    times: np.ndarray
    """The times at which ε is called, (n,)."""
    psi: np.ndarray
    """(n, *#dims, k, k)."""
    weights: np.ndarray
    """(n, q, *#dims, k, k)."""
    noise: np.ndarray
    """(n, *#dims, k, k), lower triangular, `noise noiseᵀ` the covariance that the step adds."""
    record_u: np.ndarray
    """(n+1, *#dims, k, k)."""
    record_eps: np.ndarray
    """(n+1, *#dims, k, k)."""
    carry: np.ndarray | None = None
    """(n, *#dims, k, k); None for the identity."""
    shift: np.ndarray | None = None
    """(n, *#dims, k, k); None for 0."""
    corrector: np.ndarray | None = None
    """(n, q+1, *#dims, k, k)."""
    corrector_noise: np.ndarray | None = None
    """(n, *#dims, k, k)."""
    orders: np.ndarray | None = None
    """(n,), how many nodes a step's polynomial has: fewer than asked for where history is short or has times too close."""
    corrected: np.ndarray | None = None
    """(n,) bool, the steps at which the corrector acts; None for all of them."""
    start: tuple[np.ndarray, np.ndarray] | None = None
    """`psi` and `noise` of a transition before the first call (splitting methods)."""

    def __check_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and not np.all(np.isfinite(value)):
                raise ValueError(
                    f"{name} is not finite on the grid {self.ts[0]} … {self.ts[-1]}; end it at a t_min > 0"
                )

    @property
    def stochastic(self) -> bool:
        return bool(np.any(self.noise)) or (self.start is not None and bool(np.any(self.start[1])))


class AbstractAdaptive(eqx.Module):
    """A sampler that chooses its own steps."""

    @abc.abstractmethod
    def solve(
        self, sde: AbstractLinearSDE, eps_fn: EpsFn, u: Array, ts: Any, last: Last = "none"
    ) -> tuple[Array, Array]:
        """One state at `ts[-1]` (or at 0 after a `last` call), and the number of network calls that it took."""


class AbstractSampler(eqx.Module):
    """A sampler: a description that becomes numbers on a process and a grid. Fields are static."""

    @abc.abstractmethod
    def coefficients(self, sde: AbstractLinearSDE, ts: Any) -> Coefficients:
        """The table on the grid `ts`. Raises `ValueError` for a grid that does not decrease within [0, horizon]."""

    @abc.abstractmethod
    def nfe(self, steps: int) -> int:
        """Network calls of that many steps, without the final denoising call."""


def count_calls(sampler: Any, steps: int, last: Last = "none") -> int:
    """NFE of `sample` with that many steps: network calls, the final denoising call included.

    Raises `ValueError` for a sampler that chooses its own steps.
    """
    if isinstance(sampler, AbstractAdaptive):
        raise ValueError(f"{sampler} chooses its own steps: `solve` returns the number of its calls")
    return sampler.nfe(steps) + (last != "none")


class Calls(eqx.Module):
    """A table laid out as a list of network calls: what the loop scans over. Leaves are `(calls, …)`."""

    time: Array
    slot: Array  # the history entry that this call's record goes to
    record_u: Array
    record_eps: Array
    psi: Array
    weights: Array  # (calls, SLOTS, …), in order of slots
    accept: Array  # whether the new state is the base of what follows (a prediction is not)
    step: Array  # names the step's ξ
    noisy: Array
    noise: Array
    carry: Array
    shift: Array


def calls(table: Coefficients, sde: AbstractLinearSDE, last: Last = "none") -> Calls:
    """Lay the table out as network calls, the final denoising call appended."""
    n, shape = len(table.times), table.psi.shape[1:]
    one, zero = np.broadcast_to(np.eye(shape[-1]), table.psi.shape), np.zeros(table.psi.shape)
    steps, corrected = np.arange(n), table.corrected
    if corrected is None:
        corrected = np.full(n, table.corrector is not None)
    predictor: dict[str, Any] = dict(
        time=table.times, slot=steps % SLOTS, record_u=table.record_u[:-1], record_eps=table.record_eps[:-1],
        psi=table.psi, weights=table.weights, accept=~corrected, step=steps, noise=table.noise,
        carry=one if table.carry is None else table.carry, shift=zero if table.shift is None else table.shift,
    )  # fmt: skip
    parts = [predictor]
    if table.corrector is not None and table.corrector_noise is not None:
        # its record is overwritten by that of the next call, at the corrected state;
        # where it does not act it leaves an accepted prediction as it is, and calls ε at t: at s = 0 there may be none
        acts = corrected.reshape(-1, *(1,) * len(shape))
        parts.append(predictor | dict(
            time=np.where(corrected, table.ts[1:], table.times), slot=(steps + 1) % SLOTS,
            record_u=table.record_u[1:], record_eps=table.record_eps[1:], psi=np.where(acts, table.psi, one),
            weights=np.where(acts[:, None], table.corrector, 0), accept=np.full(n, True),
            noise=np.where(acts, table.corrector_noise, 0), carry=one, shift=zero,
        ))  # fmt: skip
    rows = {name: np.stack([_pad(part[name], name) for part in parts], 1) for name in predictor}
    rows = {name: value.reshape(-1, *value.shape[2:]) for name, value in rows.items()}
    if last != "none":
        psi, weight = denoising_call(sde, table.ts[-1], last)
        final = dict(
            time=table.ts[-1], slot=n % SLOTS, record_u=zero[0], record_eps=one[0], psi=np.broadcast_to(psi, shape),
            weights=_pad(np.broadcast_to(weight, (1, 1, *shape)), "weights")[0], accept=True, step=n, noise=zero[0],
            carry=one[0], shift=zero[0],
        )  # fmt: skip
        rows = {name: np.concatenate([value, np.asarray(final[name])[None]]) for name, value in rows.items()}
    order = (rows["slot"][:, None] - np.arange(SLOTS)) % SLOTS  # where the record of j calls before stands
    by_slot = np.zeros_like(rows["weights"])
    by_slot[np.arange(len(order))[:, None], order] = rows["weights"]
    noisy = np.array([bool(np.any(x)) for x in rows["noise"]])
    return Calls(**(rows | dict(weights=by_slot, noisy=noisy)))


def _pad(value: np.ndarray, name: str) -> np.ndarray:
    """Weights `(n, q, …)` to `(n, SLOTS, …)`; anything else as it is."""
    if name != "weights":
        return value
    return np.concatenate([value, np.zeros((len(value), SLOTS - value.shape[1], *value.shape[2:]))], 1)


def denoising_call(sde: AbstractLinearSDE, t: float, last: Last) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of u and ε in the final call from t to 0: an Euler step of the reverse SDE without noise, or `D`."""
    if last not in ("euler", "data"):
        raise ValueError(f"last={last!r} must be 'none', 'euler' or 'data'")
    if t == 0:
        raise ValueError(f"last={last!r} steps from ts[-1] to 0, and ts[-1] is 0; end the grid at a t_min > 0")
    if last == "data":
        psi = on_host(sde.transition, np.zeros(()), np.asarray(t))
        return psi, -psi @ on_host(sde.noise_factor, np.asarray(t))
    F, half = sde.velocity_factors(t)
    return np.eye(sde.k) - t * F, -2 * t * half


def denoise(sde: AbstractLinearSDE, eps_fn: EpsFn, u: Array, t: float, last: Last) -> Array:
    """The state at 0 by one more call at the host time `t`: `last` is "euler" or "data"."""
    psi, weight = denoising_call(sde, t, last)
    return product(psi, u) + product(weight, predict(eps_fn, u, jnp.asarray(t, u.dtype)))


def predict(eps_fn: EpsFn, u: Array, t: Array) -> Array:
    """`ε(u, t)` in the precision of `u`. Raises `ValueError` unless it is one array of the shape of `u`."""
    eps = eps_fn(u, t)
    if not isinstance(eps, jax.Array | np.ndarray | np.generic | float | int):
        raise ValueError(f"eps_fn returned a {type(eps).__name__}; it must return ε alone, one array of the shape of u")
    eps = jnp.asarray(eps)
    if eps.shape != u.shape:
        raise ValueError(f"eps_fn returned shape {eps.shape} for a state of shape {u.shape}; the two must agree")
    return eps.astype(u.dtype)


@eqx.filter_jit
def run(rows: Calls, eps_fn: EpsFn, u: Float[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """The one loop: u after all calls. `rows` are arguments of the compiled program, so no table recompiles it."""
    rows = jax.tree.map(lambda x: x.astype(u.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, rows)

    def step(
        state: tuple[Fields, Fields, list[Fields]], row: Calls
    ) -> tuple[tuple[Fields, Fields, list[Fields]], None]:
        base, u, history = state
        eps = _apart(predict(eps_fn, _together(u), row.time))
        record = _combine((row.record_u, u), (row.record_eps, eps))
        history = [_choose(row.slot == j, record, old) for j, old in enumerate(history)]
        u = _combine((row.psi, base), *zip(row.weights, history, strict=True))

        def draw() -> Fields:
            xi = jax.random.normal(jax.random.fold_in(key, row.step), (math.prod(shape),), u[0].dtype)
            return [x + zero for x, zero in zip(_apart(xi.reshape(shape)), nothing, strict=True)]

        def add_noise(u: Fields, history: list[Fields]) -> tuple[Fields, list[Fields]]:
            moved = [_combine((row.carry, old), (row.shift, xi)) for old in history]
            return [x + y for x, y in zip(u, _combine((row.noise, xi)), strict=True)], moved

        # Drawn in a branch of its own: within the other, XLA:CPU would draw ξ anew for each of what it is added to.
        xi = jax.lax.cond(row.noisy, draw, lambda: nothing)
        u, history = jax.lax.cond(row.noisy, add_noise, lambda u, history: (u, history), u, history)
        return (_choose(row.accept, u, base), u, history), None

    shape, fields = u.shape, _apart(u)
    nothing = [0 * x for x in fields]  # of the same axes as u, where it is sharded by hand
    (_, fields, _), _ = jax.lax.scan(step, (fields, fields, [nothing] * SLOTS), rows)
    return _together(fields)


def _apart(u: Array) -> Fields:
    return [u[..., a, :] for a in range(u.shape[-2])]


def _together(u: Fields) -> Array:
    return jnp.stack(u, -2)


def _choose(first: Array, x: Fields, y: Fields) -> Fields:
    return [jnp.where(first, a, b) for a, b in zip(x, y, strict=True)]


def _combine(*terms: tuple[Array, Fields]) -> Fields:
    """`Σ A u` over the pairs of coefficients `(*#dims, k, k)` and states."""
    k, rank = len(terms[0][1]), terms[0][1][0].ndim + 1
    matrices = [A.reshape((1,) * (rank - A.ndim) + A.shape) for A, _ in terms]
    pairs = [(A, u) for A, (_, u) in zip(matrices, terms, strict=True)]
    return [sum(A[..., a, b, None] * u[b] for A, u in pairs for b in range(k)) for a in range(k)]


def sample(
    sampler: Any,
    sde: AbstractLinearSDE,
    eps_fn: EpsFn,
    u: Num[Array, "..."],
    ts: Any,
    key: PRNGKeyArray | None = None,
    last: Last = "none",
) -> Float[Array, "..."]:
    """Carry one state `u` `(*dims, k, C)` at `ts[0]` to `ts[-1]`, or to 0 with a `last` call ("euler" or "data").

    `eps_fn(u, t)` takes and returns one state; its result is cast to the precision of the loop, which is that of `u` but
    at least float32 (CLD multiplies rounding by e^8): a state in half precision is cast back at the end. Runs under `jit`,
    `vmap` and `shard_map`; coefficients are computed on the host and are arguments of the compiled loop, which is one
    program for every sampler of this package on grids that make the same number of calls. An Equinox module as `eps_fn`
    (`EpsModel`, `Denoiser`, your own) or one function compiles once, whatever arrays the module holds; a fresh lambda at
    each call compiles anew, and it and the arrays that it closes over are kept alive. `key` draws the noise of λ > 0.
    Raises `ValueError` for a state or an ε of a wrong shape, a state of integers, a grid that does not decrease within
    [0, horizon], a missing key, a `last` call after a grid that ends at 0.

    >>> sde, x0 = gddim.VP(), jnp.array([0.3, -0.8])
    >>> def eps_fn(u, t):  # the exact ε of data that are the one point x0
    ...     return (u - sde.transition(t, 0.0) * sde.lift(x0)) / sde.noise_factor(t)
    >>> u = sde.sample_prior(jax.random.key(0), (1, 2))
    >>> one_step = sample(gddim.GDDIM(order=1), sde, eps_fn, u, [1.0, 0.0])
    >>> bool(jnp.allclose(sde.project(one_step), x0, atol=1e-4))
    True
    """
    u = jnp.asarray(u)
    sde.check_state(u)
    if not jnp.issubdtype(u.dtype, jnp.floating):
        raise ValueError(f"u has dtype {u.dtype}; a state is of floating-point numbers")
    ts, dtype = check_grid(sde, ts), u.dtype
    u = u.astype(jnp.float32) if dtype.itemsize < 4 else u
    if isinstance(sampler, AbstractAdaptive):
        return sampler.solve(sde, eps_fn, u, ts, last)[0].astype(dtype)
    table = sampler.coefficients(sde, ts)
    if key is None and table.stochastic:
        raise ValueError(f"{sampler} adds noise: sample needs a key")
    first, rest = jax.random.split(jax.random.key(0) if key is None else key)
    if table.start is not None:
        psi, noise = table.start
        u = product(psi, u) + product(noise, jax.random.normal(first, u.shape, u.dtype))
    return run(calls(table, sde, last), eps_fn, u, rest).astype(dtype)
