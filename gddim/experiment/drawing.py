"""Samples of an experiment's model, and the paths on which they come about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gddim.data import to_uint8
from gddim.evaluation.drawing import Solver, draw
from gddim.evaluation.samplers import steps_for
from gddim.experiment.config import Experiment, Sampling
from gddim.parallel import batch_sharding, round_up, to_host
from gddim.samplers import GDDIM, AbstractSampler, power_grid
from gddim.sde.linalg import product


def grid(experiment: Experiment, sampling: Sampling) -> Float[np.ndarray, " n"]:
    """The times of a sampler, as many as its network calls allow; an adaptive one is given the ends."""
    sampler = sampling.sampler
    steps = steps_for(sampler, sampling.nfe, sampling.last) if isinstance(sampler, AbstractSampler) else 1
    return power_grid(experiment.sde.horizon, sampling.t_min, steps, sampling.power)


def draw_samples(
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    model: Any,
    sampling: Sampling,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[Shaped[np.ndarray, "n ..."], float]:
    """Samples 0, …, n − 1 as the data set would hold them (images in uint8), and the mean number of network calls.

    `progress` is called with how many are there.
    """
    solver = Solver.of(sampling.sampler, experiment.sde, grid(experiment, sampling), sampling.last)
    size = round_up(min(sampling.batch, sampling.samples), mesh.size)
    parts, calls = [], []
    for first in range(0, sampling.samples, size):
        numbers = jax.device_put(np.arange(first, first + size, dtype=np.int32), batch_sharding(mesh))
        found, count = draw(model, solver, experiment.data.shape, jnp.asarray(sampling.seed), numbers)
        parts.append(to_host(to_uint8(found) if found.ndim == 4 else found))
        calls.append(to_host(count))
        progress(min(first + size, sampling.samples))
    return np.concatenate(parts)[: sampling.samples], float(np.mean(np.concatenate(calls)))


class Paths(NamedTuple):
    """Probability-flow paths of several samples: times `(t,)`; for each time and sample the state and its ε in R
    coordinates, `(t, n, *dims, k, C)`, and the data and the data foreseen, `(t, n, *dims, C)`."""

    ts: Float[np.ndarray, " t"]
    states: Float[Array, "t n *state"]
    eps: Float[Array, "t n *state"]
    data: Float[Array, "t n *data"]
    foreseen: Float[Array, "t n *data"]


def follow(experiment: Experiment, model: Any, sampling: Sampling, count: int, steps: int = 64) -> Paths:
    """The paths of samples 0, …, count − 1 in gDDIM's first-order steps, and what the network says on the way."""
    sde = experiment.sde
    ts = power_grid(sde.horizon, sampling.t_min, steps, sampling.power)
    table, R = GDDIM(order=1).coefficients(sde, ts), sde.noise_factor(ts[:-1])
    back = np.stack([np.asarray(sde.transition(0.0, t)) for t in ts[:-1]])  # Ψ(0, t)

    def one(model, number):
        key, _ = jax.random.split(jax.random.fold_in(jax.random.key(sampling.seed), number))
        u = sde.sample_prior(key, experiment.state_shape)

        def step(u, row):
            t, psi, weight, R, back = row
            eps = model(u, t)
            foreseen = sde.project(product(back, u - product(R, eps)))
            return product(psi, u) + product(weight, eps), (u, eps, sde.project(u), foreseen)

        rows = jax.tree.map(lambda x: jnp.asarray(x, u.dtype), (ts[:-1], table.psi, table.weights[:, 0], R, back))
        return jax.lax.scan(step, u, rows)[1]

    found = eqx.filter_jit(jax.vmap(one, in_axes=(None, 0), out_axes=1))(model, jnp.arange(count))
    return Paths(ts[:-1], *found)
