"""A sampler is a table of numbers, laid out as a list of network calls for the one loop that reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gddim.sde.base import AbstractLinearSDE
from gddim.sde.host import on_host
from gddim.sde.linalg import Array, as_times, inverse, namespace, product

EpsFn = Callable[[Array, Array], Array]  # ε(u, t) of one state (*dims, k, C)
Callback = Callable[[Array, Array, Array], Array]  # of a state, the data foreseen and t, to the state that goes on
Last = Literal["none", "euler", "data"]
RECORD = ("record_eps", "carry", "shift")  # fields of a table that are None where the network is asked for the data
SLOTS = 5  # history entries that the loop carries at least: order 4 and the corrector's, so that these share a program


@runtime_checkable
class ProcessModel(Protocol):
    """An `EpsFn` that knows its process: a `Denoiser`, an `EpsModel`, what `through` makes, or your own."""

    @property
    def sde(self) -> AbstractLinearSDE: ...

    def __call__(self, u: Array, t: Array) -> Array: ...


@runtime_checkable
class DataModel(ProcessModel, Protocol):
    """One that also tells the data that it foresees: a `Denoiser`, or what `through` makes."""

    def denoise(self, u: Array, t: Array) -> Array:
        """`D(u, t) = E[x₀ | u]` `(*dims, C)` of one state `(*dims, k, C)`, in the basis of the process."""
        ...


class Coefficients(eqx.Module):
    """The table of a sampler on a grid: float64 NumPy on the host, each array over the n steps first.

    It is a pytree: a program may trace it, and differentiate a sample with respect to each of its numbers, times included.

    A step from `t = ts[i]` to `s = ts[i+1]` calls ε once, records `h_0 = record_u u + record_eps ε(u, times[i])`, and sets
    `u_s = psi u + Σ_j weights_j h_j + noise ξ`, h_j the record of j calls before (those that do not exist have weight 0).
    A corrector then calls ε at s, records that as h_0, and sets `u_s = psi u + Σ_j corrector_j h_j + corrector_noise ξ`
    instead, with the same ξ; at a step that is not `corrected` the prediction stands, and the second call is for nothing.
    Between steps `h ← carry h + shift ξ`. All but `ts`, `times`, `orders` and `corrected` act as `A @ u`.

    Where a record is of the data, `h_0 = record_data (D(u, times[i]) + data_u u)`, the loop keeps the one field `D + data_u u`
    instead of the k of `h_0`, of a model that has D (`DataModel`): neither rounding nor a network's error is amplified on the
    way to ε and back.
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
    record_u: Array | None
    """(n+1, *#dims, k, k); None where nothing is left of the data at `ts[0]`: ε then tells nothing of them."""
    record_eps: Array | None
    """(n+1, *#dims, k, k); None as `record_u` is."""
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
    record_data: Array | None = None
    """(n+1, *#dims, k, 1), if a record is of the data; there is then no `carry` and no `shift`."""
    data_u: Array | None = None
    """(n+1, *#dims, 1, k); None for 0."""

    def __check_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and not np.all(np.isfinite(value)):
                raise ValueError(
                    f"{name} is not finite on the grid {self.ts[0]} … {self.ts[-1]}; end it at a t_min > 0, and start it "
                    "where something is left of the data"
                )


class Calls(eqx.Module):
    """A table laid out as a list of network calls: what the loop scans over. Leaves are `(calls, …)`.

    A network call replies ε, or, where what is of ε is None, the data D: the record is then `D + record_u u`.
    """

    time: Array
    slot: Array  # the history entry that this call's record goes to
    record_u: Array
    psi: Array
    weights: Array  # (calls, slots, …, k, k), in order of slots; (calls, slots, …, k, 1) of D
    accept: Array  # whether the new state is the base of what follows (a prediction is not)
    until: Array  # the time of the new state
    step: Array  # names the step's ξ
    noisy: Array
    noise: Array
    other: tuple[Array, Array] | None  # A and B: what the call did not reply is A (u − B reply)
    record_eps: Array | None = None
    carry: Array | None = None
    shift: Array | None = None
    made: Array | None = None  # whether the call is made, and not passed over; None if all are


def calls(table: Coefficients, sde: AbstractLinearSDE, last: Last = "none", data: bool = False) -> Calls:
    """Lay the table out as network calls, the final denoising call appended: in NumPy, or traced if the table is.

    The calls are of ε, or of the data for a table with `record_data`, whose weights are then folded into those of D. There
    are as many history entries as the widest step reads, at least SLOTS.
    """
    n, shape = len(table.times), table.psi.shape[1:]
    if data:  # what is of ε is laid out, too, and left out at the end
        nothing = np.zeros((n + 1, *shape))
        table = dataclasses.replace(
            table, weights=_of_data(table.weights, table.record_data, 0), record_eps=nothing,
            record_u=nothing[..., :1, :] if table.data_u is None else table.data_u,
            corrector=None if table.corrector is None else _of_data(table.corrector, table.record_data, 1),
        )  # fmt: skip
    table = _whole(table)
    assert table.record_u is not None
    assert table.record_eps is not None
    shape, corrected = table.psi.shape[1:], table.corrected
    one, zero = np.broadcast_to(np.eye(shape[-1]), table.psi.shape), np.zeros(table.psi.shape)
    # of a splitting method the state is ahead of the grid, at the next call, except in the end
    steps, until = np.arange(n), _joined("concatenate", [table.times[1:], table.ts[-1:]])
    if corrected is None or table.corrector is None:
        corrected = np.full(n, table.corrector is not None)
    slots = max(SLOTS, *(w.shape[1] for w in (table.weights, table.corrector) if w is not None))
    predictor: dict[str, Any] = dict(
        time=table.times, slot=steps % slots, record_u=table.record_u[:-1], record_eps=table.record_eps[:-1],
        psi=table.psi, weights=_padded(table.weights, slots), accept=~corrected, until=until, step=steps,
        noise=table.noise, carry=one if table.carry is None else table.carry,
        shift=zero if table.shift is None else table.shift,
    )  # fmt: skip
    parts = [predictor]
    if table.corrector is not None:
        # its record is overwritten by that of the next call, at the corrected state;
        # where it does not act it leaves an accepted prediction as it is, and calls ε at t: at s = 0 there may be none
        acts = corrected.reshape(-1, *(1,) * len(shape))
        parts.append(predictor | dict(
            time=_where(corrected, table.ts[1:], table.times), slot=(steps + 1) % slots,
            record_u=table.record_u[1:], record_eps=table.record_eps[1:], psi=_where(acts, table.psi, one),
            weights=_where(acts[:, None], _padded(table.corrector, slots), 0.0), accept=corrected,
            noise=zero if table.corrector_noise is None else _where(acts, table.corrector_noise, 0.0), carry=one, shift=zero,
        ))  # fmt: skip
    rows = {name: _joined("stack", [part[name] for part in parts], 1) for name in predictor}
    rows = {name: value.reshape(-1, *value.shape[2:]) for name, value in rows.items()}
    if last != "none":
        psi, weight = denoising_call(sde, table.ts[-1], last, data)
        psi, weight = (namespace(A).broadcast_to(A, to) for A, to in ((psi, shape), (weight, table.weights.shape[2:])))
        final: dict[str, Any] = dict(
            time=table.ts[-1], slot=np.asarray(n % slots), record_u=0 * table.record_u[0], record_eps=one[0], psi=psi,
            weights=_padded(weight[None, None], slots)[0], accept=np.asarray(True), until=0 * table.ts[-1],
            step=np.asarray(n), noise=zero[0], carry=one[0], shift=zero[0],
        )  # fmt: skip
        rows = {name: _joined("concatenate", [value, final[name][None]]) for name, value in rows.items()}
    order = (rows["slot"][:, None] - np.arange(slots)) % slots  # before how many calls each slot was written
    by_slot = rows["weights"][np.arange(len(order))[:, None], order]
    noisy = np.full(len(order), True)  # what is traced may be noise, and is differentiated as such also where it is 0
    if namespace(rows["noise"], rows["carry"], rows["shift"]) is np:
        noisy = (rows["noise"] != 0).any(tuple(range(1, rows["noise"].ndim)))
    rows |= dict(weights=by_slot, noisy=noisy, other=(to_eps if data else to_data)(sde, rows["time"]))
    return Calls(**{name: None if data and name in RECORD else value for name, value in rows.items()})


def _whole(table: Coefficients) -> Coefficients:
    """A table whose matrices have all the dims that any of them has, as where only the noise differs by position."""
    names = "psi", "weights", "noise", "corrector", "corrector_noise", "carry", "shift", "record_u", "record_eps"
    given = {name: value for name in names if (value := getattr(table, name)) is not None}
    before = lambda name: 2 if name in ("weights", "corrector") else 1  # axes of steps and history
    dims = np.broadcast_shapes(*(value.shape[before(name) : -2] for name, value in given.items()))
    return dataclasses.replace(table, **{
        name: namespace(value).broadcast_to(value, (*value.shape[: before(name)], *dims, *value.shape[-2:]))
        for name, value in given.items()
    })  # fmt: skip


def among(rows: Calls, room: int) -> Calls:
    """The same calls, from NumPy, as the first of `room`: the loop passes over the others, at next to no cost."""
    count = len(rows.time)
    longer = jax.tree.map(lambda x: np.concatenate([x, np.zeros((room - count, *x.shape[1:]), x.dtype)]), rows)
    return dataclasses.replace(longer, made=np.arange(room) < count)


def _of_data(weights: Array, record_data: Array, after: int) -> Array:
    """Weights of D `(n, q, …, k, 1)`: their nodes are those of calls i + after, and those before."""
    n, q = weights.shape[:2]
    calls = np.arange(n)[:, None] + after - np.arange(q)
    _, weights, record = as_times(weights, record_data)
    return product(weights, record[np.maximum(calls, 0)])  # before the first they are 0


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


def denoising_call(sde: AbstractLinearSDE, t: Array, last: Last, data: bool = False) -> tuple[Array, Array]:
    """The matrices of u and ε, or D, in the final call from t to 0: an Euler step of the reverse SDE without noise, or `D`."""
    if last not in ("euler", "data"):
        raise ValueError(f"last={last!r} must be 'none', 'euler' or 'data'")
    if namespace(t) is np and t == 0:
        raise ValueError(f"last={last!r} steps from ts[-1] to 0, and ts[-1] is 0; end the grid at a t_min > 0")
    if last == "data":
        if data:
            return np.zeros((sde.k, sde.k)), np.eye(sde.k, 1)
        psi, R = to_data(sde, t)
        return psi, -product(psi, R)
    F, half = sde.velocity_factors(t)
    F, half = namespace(F).eye(sde.k, dtype=F.dtype) - t * F, -2 * t * half
    if data:
        R_inv, psi = to_eps(sde, t)
        half = product(half, R_inv)
        return F + half, -product(half, psi)
    return F, half


def to_data(sde: AbstractLinearSDE, t: Array) -> tuple[Array, Array]:
    """`Ψ(0, t)` and `R_t`, with which the data foreseen are `D = Ψ(0, t) (u − R_t ε)`; at all times of an array."""
    return _psi_and_R(sde, 0 * t, t, t)


def to_eps(sde: AbstractLinearSDE, t: Array) -> tuple[Array, Array]:
    """`R_t⁻¹` and `ψ_t = Ψ(t, 0) e_0`, with which `ε = R_t⁻¹ (u − ψ_t D)`; at all times of an array."""
    psi, R = _psi_and_R(sde, t, 0 * t, t)
    with np.errstate(all="ignore"):  # where R is singular no call is made
        return inverse(R), psi[..., :1]


def _psi_and_R(sde: AbstractLinearSDE, late: Array, early: Array, t: Array) -> tuple[Array, Array]:
    if namespace(t) is np:
        with np.errstate(all="ignore"):  # where nothing is left of the data they cannot be foreseen
            return on_host(sde.transition, *map(np.asarray, (late, early))), on_host(sde.noise_factor, np.asarray(t))
    both = lambda late, early, t: (jnp.asarray(sde.transition(late, early)), jnp.asarray(sde.noise_factor(t)))
    return (jax.vmap(both) if t.ndim else both)(late, early, t)
