"""Evaluation of functions of time on the host in float64, whatever they are written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def in_float64(fn: Callable[..., Any], *times: np.ndarray) -> np.ndarray:
    """`fn` of scalar times, mapped over arrays of times of one shape; float64 NumPy, `(*times.shape, *fn.shape)`.

    A function that JAX can trace runs as one program on the CPU under a local x64 scope; any other (one that calls
    `math.exp`, say) is called time by time.
    """
    shape = np.shape(times[0])
    flat = [np.asarray(t, np.float64).reshape(-1) for t in times]
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            values = np.asarray(jax.jit(jax.vmap(lambda *ts: jnp.asarray(fn(*ts), jnp.float64)))(*flat))
        except jax.errors.JAXTypeError:
            values = np.stack([np.asarray(fn(*(float(t) for t in ts)), np.float64) for ts in zip(*flat, strict=True)])
    return values.reshape(shape + values.shape[1:])


def on_host(fn: Callable[..., Any], *times: np.ndarray) -> np.ndarray:
    """Like `in_float64` for a process's own methods, which answer NumPy times in NumPy unless a user wrote them in JAX."""
    probe = fn(*(np.asarray(t, np.float64).reshape(-1)[0] for t in times))
    if isinstance(probe, np.ndarray):
        return fn(*(np.asarray(t, np.float64) for t in times))
    return in_float64(fn, *times)
