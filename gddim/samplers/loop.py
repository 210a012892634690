"""The one loop that reads the tables of all samplers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from gddim.samplers.base import Callback, Calls, DataModel, EpsFn, Last, denoising_call
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.linalg import Array, product

# A state with its k fields apart, each (*dims, C): products are then sums of whole arrays, which every backend fuses, and
# which XLA:CPU runs 8 to 90 times as fast as sums over an axis of length k.
Fields = list[Array]


def denoise(sde: AbstractLinearSDE, eps_fn: EpsFn, u: Array, t: float, last: Last) -> Array:
    """The state at 0 by one more call at the host time `t`: `last` is "euler" or "data"."""
    psi, weight = denoising_call(sde, t, last)
    return product(psi, u) + product(weight, predict(eps_fn, u, jnp.asarray(t, u.dtype)))


def predict(eps_fn: EpsFn, u: Array, t: Array) -> Array:
    """`ε(u, t)` in the precision of `u`. Raises `ValueError` unless it is one array of the shape of `u`."""
    eps = _one_array(eps_fn(u, t), "eps_fn", "ε alone, one array of the shape of u")
    if eps.shape != u.shape:
        raise ValueError(f"eps_fn returned shape {eps.shape} for a state of shape {u.shape}; the two must agree")
    return eps.astype(u.dtype)


def foresee(model: DataModel, u: Array, t: Array) -> Array:
    """`D(u, t)` as one field, `(*dims, 1, C)`, in the precision of `u`. Raises `ValueError` unless it is `(*dims, C)`."""
    data, expected = _one_array(model.denoise(u, t), "denoise", "the data alone, one array"), u[..., 0, :].shape
    if data.shape != expected:
        raise ValueError(f"denoise returned shape {data.shape} for a state of shape {u.shape}; it must be {expected}")
    return data[..., None, :].astype(u.dtype)


def _one_array(reply: Any, name: str, what: str) -> jax.Array:
    if not isinstance(reply, jax.Array | np.ndarray | np.generic | float | int):
        raise ValueError(f"{name} returned a {type(reply).__name__}; it must return {what}")
    return jnp.asarray(reply)


class Path(NamedTuple):
    """How a state came about, over the network calls first."""

    times: Float[Array, " calls"]
    states: Float[Array, "calls *state"]
    """What the network was called with."""
    eps: Float[Array, "calls *state"]
    """What it said, in R coordinates."""
    foreseen: Float[Array, "calls *state"]
    """`Ψ(0, t) (u − R_t ε)`: the state at 0 that this foresees. Of a model that was asked for D it is D, and ε follows."""


@eqx.filter_jit
def run(
    rows: Calls,
    model: Any,
    u: Float[Array, "..."],
    key: PRNGKeyArray,
    path: bool = False,
    callback: Callback | None = None,
) -> tuple[Float[Array, "..."], Path | None]:
    """The one loop: u after all calls, and the path there if that was asked for. `callback` changes the state after a step.

    `rows` are arguments of the compiled program, so no table recompiles it; `other` is for a path, or a callback
    on ε, and those that are not all made have no path. `model` is an `EpsFn`, or for rows of D a `DataModel`.
    """
    rows = jax.tree.map(lambda x: x.astype(u.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, rows)
    of_data = rows.record_eps is None

    def step(
        state: tuple[Fields, Fields, list[Fields]], row: Calls
    ) -> tuple[tuple[Fields, Fields, list[Fields]], Path | None]:
        base, fields, history = state
        u = _together(fields)
        reply = foresee(model, u, row.time) if of_data else predict(model, u, row.time)
        foreseen, way = reply, None
        if row.other is not None:
            other = product(row.other[0], u - product(row.other[1], reply))
            eps, foreseen = (other, product(np.eye(u.shape[-2], 1), reply)) if of_data else (reply, other)
            way = Path(row.time, u, eps, foreseen) if path else None
        record = _apart(reply)
        if of_data:
            record = [record[0] + _combine((row.record_u, fields))[0]]
        else:
            record = _combine((row.record_u, fields), (row.record_eps, record))
        history = [_choose(row.slot == j, record, old) for j, old in enumerate(history)]
        fields = _combine((row.psi, base), *zip(row.weights, history, strict=True))

        def random() -> Fields:
            xi = jax.random.normal(jax.random.fold_in(key, row.step), (math.prod(shape),), fields[0].dtype)
            return [x + zero for x, zero in zip(_apart(xi.reshape(shape)), nothing, strict=True)]

        def add_noise(fields: Fields, history: list[Fields]) -> tuple[Fields, list[Fields]]:
            moved = history if of_data else [_combine((row.carry, old), (row.shift, xi)) for old in history]
            return [x + y for x, y in zip(fields, _combine((row.noise, xi)), strict=True)], moved

        # Drawn in a branch of its own: within the other, XLA:CPU would draw ξ anew for each of what it is added to.
        xi = jax.lax.cond(row.noisy, random, lambda: nothing)
        fields, history = jax.lax.cond(row.noisy, add_noise, lambda *same: same, fields, history)
        if callback is not None:
            changed = partial(_called_back, callback)  # but no prediction that is corrected
            told = _together(fields), foreseen[..., 0, :], row.until
            fields = jax.lax.cond(row.accept, changed, lambda *_: fields, *told)
        return (_choose(row.accept, fields, base), fields, history), way

    def step_if_made(state: tuple[Fields, Fields, list[Fields]], row: Calls) -> Any:
        return jax.lax.cond(row.made, step, lambda state, row: (state, None), state, row)

    shape, fields = u.shape, _apart(u)
    nothing = [jnp.zeros_like(x) for x in fields]  # varies over a mesh as u does, where it is sharded by hand
    history = [nothing[: rows.weights.shape[-1]]] * rows.weights.shape[1]
    (_, fields, _), way = jax.lax.scan(step if rows.made is None else step_if_made, (fields, fields, history), rows)
    return _together(fields), way


def _called_back(callback: Callback, u: Array, data: Array, t: Array) -> Fields:
    """What `callback` makes of a state. Raises `ValueError` unless it is one of the same shape."""
    changed = _one_array(callback(u, data, t), "callback", "the state alone, one array")
    if changed.shape != u.shape:
        raise ValueError(f"callback returned shape {changed.shape} for a state of shape {u.shape}; the two must agree")
    return _apart(changed.astype(u.dtype) + jnp.zeros_like(u))  # varies over a mesh as u does


def _apart(u: Array) -> Fields:
    return [u[..., a, :] for a in range(u.shape[-2])]


def _together(u: Fields) -> Array:
    return jnp.stack(u, -2)


def _choose(first: Array, x: Fields, y: Fields) -> Fields:
    return [jnp.where(first, a, b) for a, b in zip(x, y, strict=True)]


def _combine(*terms: tuple[Array, Fields]) -> Fields:
    """`Σ A u` over the pairs of coefficients `(*#dims, k, h)` and arrays of h fields."""
    k, rank = terms[0][0].shape[-2], terms[0][1][0].ndim + 1
    matrices = [A.reshape((1,) * (rank - A.ndim) + A.shape) for A, _ in terms]
    pairs = [(A, u) for A, (_, u) in zip(matrices, terms, strict=True)]
    return [sum(A[..., a, b, None] * x for A, u in pairs for b, x in enumerate(u)) for a in range(k)]
