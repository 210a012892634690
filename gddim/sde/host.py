"""Evaluation of functions of time on the host in float64, whatever they are written in."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gddim.errors import UserError


def as_index(value: Any) -> Any:
    """An integer of any library as Python's; anything else as it is, to be refused by name."""
    try:
        return operator.index(value)
    except TypeError:
        return value


@contextmanager
def float64_on_cpu() -> Iterator[None]:
    """What JAX computes within, while something else is being traced too."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(
            f"JAX_PLATFORMS={asked}: processes in jax.numpy are computed on the CPU, in float64: give {asked},cpu"
        ) from error
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(cpu):
        yield


def in_float64(fn: Callable[..., Any], *times: np.ndarray) -> Any:
    """`fn`, which JAX can trace, of scalar times, mapped over arrays of times of one shape: one program on the CPU.

    Returns float64 NumPy `(*times.shape, *fn.shape)`, or a tuple of them. Works while something else is being traced, too.
    """
    flat = [np.asarray(t, np.float64).reshape(-1) for t in times]
    count = flat[0].size
    padded = [np.pad(t, (0, 2 ** (count - 1).bit_length() - count), mode="edge") for t in flat]  # few shapes to compile
    with float64_on_cpu():
        values = _mapped(fn, *padded)
        reshaped = lambda v: np.asarray(v)[:count].reshape(np.shape(times[0]) + v.shape[1:])
        return tuple(map(reshaped, values)) if isinstance(values, tuple) else reshaped(values)


@partial(jax.jit, static_argnums=0)
def _mapped(fn: Callable[..., Any], *times: Any) -> Any:
    return jax.vmap(lambda *ts: _floats(fn(*ts)))(*times)


def _floats(value: Any) -> Any:
    return tuple(map(_floats, value)) if isinstance(value, tuple) else jnp.asarray(value, jnp.float64)


def on_host(fn: Callable[..., Any], *times: np.ndarray) -> np.ndarray:
    """Like `in_float64` for a process's own methods, which answer NumPy times in NumPy unless a user wrote them in JAX."""
    probe = fn(*(np.asarray(t, np.float64).reshape(-1)[0] for t in times))
    if isinstance(probe, np.ndarray):
        values = fn(*(np.asarray(t, np.float64) for t in times))
        if values.shape[: times[0].ndim] != times[0].shape:
            raise ValueError(
                f"{fn.__qualname__} of times of shape {times[0].shape} has shape {values.shape}: it must begin with theirs, "
                "or the function be written in jax.numpy, which is mapped over them"
            )
        return values
    return in_float64(fn, *times)
