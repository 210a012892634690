"""Samples of an experiment's model, and the paths on which they come about."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gddim.data import LABEL, to_uint8
from gddim.experiment.config import Experiment, Sampling
from gddim.model import seen_through
from gddim.parallel import batch_sharding, round_up, to_host
from gddim.samplers import GDDIM
from gddim.samplers.base import ProcessModel
from gddim.samplers.numbered import sample_numbered


def draw_samples(
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    model: ProcessModel,
    sampling: Sampling,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[Shaped[np.ndarray, "n ..."], float]:
    """Samples 0, …, n − 1 as the data set would hold them (images in uint8), and the mean number of network calls.

    Where the run has classes, n and each sample's class are those of `Experiment.drawn_classes`.

    `progress` is called with how many are there.
    """
    sde = experiment.through(sampling.process)
    model, solver = seen_through(model, sde), sampling.method(sde).solver(sde)
    classes = experiment.drawn_classes(sampling)
    n = sampling.samples if classes is None else len(classes)
    size = round_up(min(sampling.batch, n), mesh.size)
    parts, calls = [], []
    for first in range(0, n, size):
        rows = np.arange(first, first + size, dtype=np.int32)
        cond = None if classes is None else {LABEL: classes[np.minimum(rows, n - 1)]}
        numbers, cond = jax.device_put((rows, cond), batch_sharding(mesh))
        seed = jnp.asarray(sampling.seed)
        found, count, _ = sample_numbered(model, solver, experiment.data.shape, seed, numbers, cond=cond)
        parts.append(to_host(to_uint8(found) if found.ndim == 4 else found))
        calls.append(to_host(count))
        progress(min(first + size, n))
    return np.concatenate(parts)[:n], float(np.mean(np.concatenate(calls)))


class Paths(NamedTuple):
    """Probability-flow paths of several samples: times `(t,)`; for each time and sample its ε in R coordinates,
    `(t, n, *dims, k, C)`, and the data and the data foreseen, `(t, n, *dims, C)`, the former made no larger than white data
    where noise makes them so."""

    ts: Float[np.ndarray, " t"]
    eps: Float[Array, "t n *state"]
    data: Float[Array, "t n *data"]
    foreseen: Float[Array, "t n *data"]


def follow(experiment: Experiment, model: ProcessModel, sampling: Sampling, count: int, steps: int = 64) -> Paths:
    """The paths of samples 0, …, count − 1 in gDDIM's first-order steps, and what the network says on the way."""
    sde = experiment.through(sampling.process)
    ts = sampling.flow_grid(sde, steps)
    numbers, seed, classes = jnp.arange(count), jnp.asarray(sampling.seed), experiment.drawn_classes(sampling)
    cond = None if classes is None else {LABEL: jnp.asarray(np.resize(classes, count))}
    model, solver = seen_through(model, sde), GDDIM(order=1).solver(sde, ts)
    _, _, path = sample_numbered(model, solver, experiment.data.shape, seed, numbers, path=True, cond=cond)
    assert path is not None
    project = jax.jit(jax.vmap(jax.vmap(sde.project)))
    spread = np.sqrt(sde.prior_covariance(ts[:-1])[..., 0, 0]).reshape(steps, -1).max(-1)
    size = jnp.asarray(np.maximum(spread, 1), path.states.dtype).reshape(-1, *[1] * (path.states.ndim - 2))
    return Paths(ts[:-1], path.eps, project(path.states) / size, project(path.foreseen))
