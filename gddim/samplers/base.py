"""A sampler is a table of numbers and the one loop that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from gddim.sde.base import AbstractLinearSDE
from gddim.sde.host import on_host
from gddim.sde.linalg import Array, as_times, namespace, product

EpsFn = Callable[[Array, Array], Array]  # ε(u, t) of one state (*dims, k, C)
Last = Literal["none", "euler", "data"]
# A state with its k fields apart, each (*dims, C): products are then sums of whole arrays, which every backend fuses, and
# which XLA:CPU runs 8 to 90 times as fast as sums over an axis of length k.
Fields = list[Array]
SLOTS = 5  # history entries that the loop carries at least: order 4 and the corrector's, so that these share a program


@runtime_checkable
class ProcessModel(Protocol):
    """An `EpsFn` that knows its process: a `Denoiser`, an `EpsModel`, what `through` makes, or your own."""

    @property
    def sde(self) -> AbstractLinearSDE: ...

    def __call__(self, u: Array, t: Array) -> Array: ...


class Coefficients(eqx.Module):
    """The table of a sampler on a grid: float64 NumPy on the host, each array over the n steps first.

    It is a pytree: a program may trace it, and differentiate a sample with respect to each of its numbers, times included.

    A step from `t = ts[i]` to `s = ts[i+1]` calls ε once, records `h_0 = record_u u + record_eps ε(u, times[i])`, and sets
    `u_s = psi u + Σ_j weights_j h_j + noise ξ`, h_j the record of j calls before (those that do not exist have weight 0).
    A corrector then calls ε at s, records that as h_0, and sets `u_s = psi u + Σ_j corrector_j h_j + corrector_noise ξ`
    instead, with the same ξ; at a step that is not `corrected` the prediction stands, and the second call is for nothing.
    Between steps `h ← carry h + shift ξ`. All but `ts`, `times`, `orders` and `corrected` act as `A @ u`.
    """

    ts: Array
    """The grid, (n+1,)."""
    times: Array
    """The times at which ε is called, (n,)."""
    psi: Array
    """(n, *#dims, k, k)."""
    weights: Array
    """(n, q, *#dims, k, k)."""
    noise: Array
    """(n, *#dims, k, k), lower triangular, `noise noiseᵀ` the covariance that the step adds."""
    record_u: Array
    """(n+1, *#dims, k, k)."""
    record_eps: Array
    """(n+1, *#dims, k, k)."""
    carry: Array | None = None
    """(n, *#dims, k, k); None for the identity."""
    shift: Array | None = None
    """(n, *#dims, k, k); None for 0."""
    corrector: Array | None = None
    """(n, q+1, *#dims, k, k)."""
    corrector_noise: Array | None = None
    """(n, *#dims, k, k)."""
    orders: Array | None = None
    """(n,), how many nodes a step's polynomial has: fewer than asked for where history is short or has times too close."""
    corrected: Array | None = None
    """(n,) bool, the steps at which the corrector acts; None for all of them."""
    start: tuple[Array, Array] | None = None
    """`psi` and `noise` of a transition before the first call (splitting methods)."""

    def __check_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and not np.all(np.isfinite(value)):
                raise ValueError(
                    f"{name} is not finite on the grid {self.ts[0]} … {self.ts[-1]}; end it at a t_min > 0"
                )


class Calls(eqx.Module):
    """A table laid out as a list of network calls: what the loop scans over. Leaves are `(calls, …)`."""

    time: Array
    slot: Array  # the history entry that this call's record goes to
    record_u: Array
    record_eps: Array
    psi: Array
    weights: Array  # (calls, slots, …), in order of slots
    accept: Array  # whether the new state is the base of what follows (a prediction is not)
    step: Array  # names the step's ξ
    noisy: Array
    noise: Array
    carry: Array
    shift: Array


def calls(table: Coefficients, sde: AbstractLinearSDE, last: Last = "none") -> Calls:
    """Lay the table out as network calls, the final denoising call appended: in NumPy, or traced if the table is.

    There are as many history entries as the widest step reads, at least SLOTS.
    """
    n, shape, corrected = len(table.times), table.psi.shape[1:], table.corrected
    one, zero = np.broadcast_to(np.eye(shape[-1]), table.psi.shape), np.zeros(table.psi.shape)
    steps = np.arange(n)
    if corrected is None:
        corrected = np.full(n, table.corrector is not None)
    slots = max(SLOTS, *(w.shape[1] for w in (table.weights, table.corrector) if w is not None))
    predictor: dict[str, Any] = dict(
        time=table.times, slot=steps % slots, record_u=table.record_u[:-1], record_eps=table.record_eps[:-1],
        psi=table.psi, weights=_padded(table.weights, slots), accept=~corrected, step=steps, noise=table.noise,
        carry=one if table.carry is None else table.carry, shift=zero if table.shift is None else table.shift,
    )  # fmt: skip
    parts = [predictor]
    if table.corrector is not None and table.corrector_noise is not None:
        # its record is overwritten by that of the next call, at the corrected state;
        # where it does not act it leaves an accepted prediction as it is, and calls ε at t: at s = 0 there may be none
        acts = corrected.reshape(-1, *(1,) * len(shape))
        parts.append(predictor | dict(
            time=_where(corrected, table.ts[1:], table.times), slot=(steps + 1) % slots,
            record_u=table.record_u[1:], record_eps=table.record_eps[1:], psi=_where(acts, table.psi, one),
            weights=_where(acts[:, None], _padded(table.corrector, slots), 0.0), accept=np.full(n, True),
            noise=_where(acts, table.corrector_noise, 0.0), carry=one, shift=zero,
        ))  # fmt: skip
    rows = {name: _joined("stack", [part[name] for part in parts], 1) for name in predictor}
    rows = {name: value.reshape(-1, *value.shape[2:]) for name, value in rows.items()}
    if last != "none":
        psi, weight = (namespace(A).broadcast_to(A, shape) for A in denoising_call(sde, table.ts[-1], last))
        final: dict[str, Any] = dict(
            time=table.ts[-1], slot=np.asarray(n % slots), record_u=zero[0], record_eps=one[0], psi=psi,
            weights=_padded(weight[None, None], slots)[0], accept=np.asarray(True), step=np.asarray(n),
            noise=zero[0], carry=one[0], shift=zero[0],
        )  # fmt: skip
        rows = {name: _joined("concatenate", [value, final[name][None]]) for name, value in rows.items()}
    order = (rows["slot"][:, None] - np.arange(slots)) % slots  # before how many calls each slot was written
    by_slot = rows["weights"][np.arange(len(order))[:, None], order]
    noisy = np.full(len(order), True)  # what is traced may be noise, and is differentiated as such also where it is 0
    if namespace(rows["noise"], rows["carry"], rows["shift"]) is np:
        noisy = (rows["noise"] != 0).any(tuple(range(1, rows["noise"].ndim)))
    return Calls(**(rows | dict(weights=by_slot, noisy=noisy)))


def _joined(how: str, values: list[Array], axis: int = 0) -> Array:
    """`stack` or `concatenate` of arrays: in NumPy, or if one is JAX's then in its precision."""
    xp, traced = namespace(*values), [v.dtype for v in values if isinstance(v, jax.Array)]
    dtype = jnp.result_type(*traced) if traced else None
    return getattr(xp, how)([xp.asarray(v, dtype) for v in values], axis)


def _where(condition: Array, x: Array, y: Array) -> Array:
    _, x, y = as_times(x, y)
    return namespace(condition, x).where(condition, x, y)


def _padded(weights: Array, slots: int) -> Array:
    """Weights `(n, q, …)` to `(n, slots, …)`."""
    n, q, *shape = weights.shape
    return _joined("concatenate", [weights, np.zeros((n, slots - q, *shape))], 1)


def denoising_call(sde: AbstractLinearSDE, t: Array, last: Last) -> tuple[Array, Array]:
    """The matrices of u and ε in the final call from t to 0: an Euler step of the reverse SDE without noise, or `D`."""
    if last not in ("euler", "data"):
        raise ValueError(f"last={last!r} must be 'none', 'euler' or 'data'")
    if namespace(t) is np and t == 0:
        raise ValueError(f"last={last!r} steps from ts[-1] to 0, and ts[-1] is 0; end the grid at a t_min > 0")
    if last == "data":
        psi, R = to_data(sde, t)
        return psi, -product(psi, R)
    F, half = sde.velocity_factors(t)
    return namespace(F).eye(sde.k, dtype=F.dtype) - t * F, -2 * t * half


def to_data(sde: AbstractLinearSDE, t: Array) -> tuple[Array, Array]:
    """`Ψ(0, t)` and `R_t`, with which the data foreseen are `D = Ψ(0, t) (u − R_t ε)`; at all times of an array."""
    if namespace(t) is np:
        with np.errstate(all="ignore"):  # where nothing is left of the data they cannot be foreseen
            return on_host(sde.transition, np.zeros_like(t), np.asarray(t)), on_host(sde.noise_factor, np.asarray(t))
    both = lambda t: (jnp.asarray(sde.transition(jnp.zeros_like(t), t)), jnp.asarray(sde.noise_factor(t)))
    return jax.vmap(both)(t) if t.ndim else both(t)


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


class Path(NamedTuple):
    """How a state came about, over the network calls first."""

    times: Float[Array, " calls"]
    states: Float[Array, "calls *state"]
    """What the network was called with."""
    eps: Float[Array, "calls *state"]
    """What it said, in R coordinates."""
    foreseen: Float[Array, "calls *state"]
    """`Ψ(0, t) (u − R_t ε)`: the state at 0 that this foresees."""


@eqx.filter_jit
def run(
    rows: Calls, eps_fn: EpsFn, u: Float[Array, "..."], key: PRNGKeyArray, foresee: tuple[Array, Array] | None = None
) -> tuple[Float[Array, "..."], Path | None]:
    """The one loop: u after all calls, and the path there if the matrices `foresee` of its times (`to_data`) are given.

    `rows` are arguments of the compiled program, so no table recompiles it.
    """
    rows, foresee = jax.tree.map(
        lambda x: x.astype(u.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, (rows, foresee)
    )

    def step(
        state: tuple[Fields, Fields, list[Fields]], call: tuple[Calls, tuple[Array, Array] | None]
    ) -> tuple[tuple[Fields, Fields, list[Fields]], Path | None]:
        (base, fields, history), (row, foresee) = state, call
        u = _together(fields)
        eps = predict(eps_fn, u, row.time)
        path = None
        if foresee is not None:
            path = Path(row.time, u, eps, product(foresee[0], u - product(foresee[1], eps)))
        record = _combine((row.record_u, fields), (row.record_eps, _apart(eps)))
        history = [_choose(row.slot == j, record, old) for j, old in enumerate(history)]
        fields = _combine((row.psi, base), *zip(row.weights, history, strict=True))

        def random() -> Fields:
            xi = jax.random.normal(jax.random.fold_in(key, row.step), (math.prod(shape),), fields[0].dtype)
            return [x + zero for x, zero in zip(_apart(xi.reshape(shape)), nothing, strict=True)]

        def add_noise(fields: Fields, history: list[Fields]) -> tuple[Fields, list[Fields]]:
            moved = [_combine((row.carry, old), (row.shift, xi)) for old in history]
            return [x + y for x, y in zip(fields, _combine((row.noise, xi)), strict=True)], moved

        # Drawn in a branch of its own: within the other, XLA:CPU would draw ξ anew for each of what it is added to.
        xi = jax.lax.cond(row.noisy, random, lambda: nothing)
        fields, history = jax.lax.cond(row.noisy, add_noise, lambda *same: same, fields, history)
        return (_choose(row.accept, fields, base), fields, history), path

    shape, fields = u.shape, _apart(u)
    nothing = [jnp.zeros_like(x) for x in fields]  # varies over a mesh as u does, where it is sharded by hand
    (_, fields, _), path = jax.lax.scan(step, (fields, fields, [nothing] * rows.weights.shape[1]), (rows, foresee))
    return _together(fields), path


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
