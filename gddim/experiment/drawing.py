"""Samples of an experiment's model, and the paths on which they come about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from gddim.data import LABEL, to_uint8, to_unit
from gddim.errors import UserError, require
from gddim.experiment.config import Experiment, Sampling
from gddim.experiment.plan import Plan
from gddim.guidance import Guidance
from gddim.model import seen_through
from gddim.parallel import batch_sharding, round_up, tell, to_host
from gddim.samplers import GDDIM
from gddim.samplers.base import ProcessModel
from gddim.samplers.grids import time_at
from gddim.samplers.method import check_methods
from gddim.samplers.numbered import sample_numbered
from gddim.samplers.solver import AbstractSolver


class CallCount(NamedTuple):
    """Of a sample, on average."""

    made: float
    """Calls of the network, those that are guided counted once too."""
    evaluations: float
    """Evaluations of a network: twice as many in calls that are guided."""

    def __str__(self) -> str:
        more = "" if self.made == self.evaluations else f" ({self.evaluations:g} network evaluations)"
        return f"{self.made:g}{more}"


class NoisedData(NamedTuple):
    """Given data, noised, at which samples start in place of noise alone."""

    data: Shaped[np.ndarray, "m ..."]
    """As the data set would hold them."""
    time: float
    """To which they are noised."""

    @staticmethod
    def of(experiment: Experiment, data: Shaped[np.ndarray, "m ..."], strength: float) -> NoisedData:
        """Of a share of noise in the variance of `x₀ + σn`, 1 being noise alone, whichever the process and the sampler.

        Raises `UserError` for so little of it that there is no step to make, a sampler that cannot start there, and more data
        than samples.
        """
        sampling, classes = experiment.sampling, experiment.drawn_classes(experiment.sampling)
        n = sampling.samples if classes is None else len(classes)
        require(len(data) <= n, f"--from: {len(data)} images, and {n} to be drawn: ask for at least as many")
        sde, sigma = experiment.through(sampling.process), np.inf
        if strength < 1:
            sigma = experiment.model.rms * (strength / (1 - strength)) ** 0.5
        time, method = time_at(sde, sigma), sampling.method(sde, experiment.data.shape)
        that = f"strength {strength:g}: that is time {time:.2g}, and"
        require(time > method.t_min, f"{that} samplers stop at {method.t_min:g} (sampling.t_min)")
        try:
            check_methods([replace(method, start=time)], sde)
        except UserError as error:
            raise UserError(f"{that} {error}") from error
        return NoisedData(data, time)


def numbered_batches(
    mesh: jax.sharding.Mesh, n: int, batch: int, given: PyTree = None
) -> Iterator[tuple[Int[Array, " b"], PyTree]]:
    """Batches of the sample numbers 0, …, n − 1, spread over the devices, each with its rows of `given`.

    The last numbers go beyond n, so that all batches are of one size, and have the row of the last sample.
    """
    size = round_up(min(batch, n), mesh.size)
    for first in range(0, n, size):
        numbers = np.arange(first, first + size, dtype=np.int32)
        of = np.minimum(numbers, n - 1)
        rows = jax.tree.map(lambda x, of=of: x[of], given)
        yield jax.device_put((numbers, rows), batch_sharding(mesh))


def draw_numbered(
    mesh: jax.sharding.Mesh,
    model: ProcessModel,
    solver: AbstractSolver,
    shape: tuple[int, ...],
    sampling: Sampling,
    n: int,
    held: Callable[[Float[Array, "b ..."]], Array],
    progress: Callable[[int], object],
    cond: PyTree,
    start: NoisedData | None = None,
) -> tuple[Shaped[np.ndarray, "n ..."], float]:
    """Samples 0, …, n − 1 of the sampling's seed, so many at a time as it says, held as given, and the mean of their calls.

    `cond`, and the data of a `start`, have a row for each. `progress` is called with how many are there. Tells how many are
    not finite.
    """
    seed, parts, calls, finite = jnp.asarray(sampling.seed), [], [], []
    rows = (cond, None if start is None else start.data)
    for numbers, (told, data) in numbered_batches(mesh, n, sampling.batch, rows):
        begin = None if start is None else (to_unit(data), jnp.asarray(start.time, jnp.float32))
        drawn = sample_numbered(model, solver, shape, seed, numbers, cond=told, begin=begin)
        parts.append(to_host(held(drawn.data)))
        calls.append(to_host(drawn.calls))
        finite.append(to_host(drawn.finite))
        progress(min(len(numbers) * len(parts), n))
    if lost := n - int(np.concatenate(finite)[:n].sum()):
        tell(f"warning: {lost} of {n} samples are not finite")
    return np.concatenate(parts)[:n], float(np.mean(np.concatenate(calls)[:n]))


def draw_samples(
    plan: Plan,
    model: ProcessModel,
    sampling: Sampling,
    progress: Callable[[int], object] = lambda count: None,
    guidance: Guidance | None = None,
    start: NoisedData | None = None,
) -> tuple[Shaped[np.ndarray, "n ..."], CallCount]:
    """Samples 0, …, n − 1 as the data set would hold them (images of bytes in uint8), and the network calls of one.

    Where the run has classes, n and each sample's class are those of `Experiment.drawn_classes`.

    `progress` is called with how many are there; `guidance` is that of `sampling`, with its worse network;
    with a `start` samples are spread evenly over the given data, in order. Tells how many are not finite.
    """
    experiment = plan.experiment
    sde, shape = experiment.through(sampling.process), experiment.data.shape
    guidance = guidance or sampling.guide.away_from()
    method = replace(sampling.method(sde, shape), start=None if start is None else start.time)
    model, solver = guidance(seen_through(model, sde)), method.solver(sde)
    classes = experiment.drawn_classes(sampling)
    n = sampling.samples if classes is None else len(classes)
    told = None if classes is None else {LABEL: classes}
    if start is not None:
        start = start._replace(data=start.data[np.arange(n) * len(start.data) // n])
    held = to_uint8 if plan.rounds else lambda x: x
    drawn, made = draw_numbered(plan.mesh, model, solver, shape, sampling, n, held, progress, told, start)
    return drawn, CallCount(made, guidance.evaluations(sde, made, solver.times))


class Paths(NamedTuple):
    """Probability-flow paths of several samples: times `(t,)`; for each time and sample its ε in R coordinates,
    `(t, n, *dims, k, C)`, and the data and the data foreseen, `(t, n, *dims, C)`, the former made no larger than white data
    where noise makes them so."""

    ts: Float[np.ndarray, " t"]
    eps: Float[np.ndarray, "t n *state"]
    data: Float[np.ndarray, "t n *data"]
    foreseen: Float[np.ndarray, "t n *data"]


def follow(
    experiment: Experiment,
    model: ProcessModel,
    sampling: Sampling,
    guidance: Guidance,
    count: int,
    ts: Float[np.ndarray, " n"],
) -> Paths:
    """The paths of samples 0, …, count − 1 in gDDIM's first-order steps, and what the network says on the way."""
    sde = experiment.through(sampling.process)
    numbers, seed, classes = jnp.arange(count), jnp.asarray(sampling.seed), experiment.drawn_classes(sampling)
    cond = None if classes is None else {LABEL: jnp.asarray(np.resize(classes, count))}
    model, solver = guidance(seen_through(model, sde)), GDDIM(order=1).solver(sde, ts)
    _, _, path = sample_numbered(model, solver, experiment.data.shape, seed, numbers, path=True, cond=cond)
    assert path is not None
    project = jax.jit(jax.vmap(jax.vmap(sde.project)))
    spread = [np.sqrt(np.max(sde.prior_covariance(t)[..., 0, 0])) for t in ts[:-1]]
    size = jnp.asarray(np.maximum(spread, 1), path.states.dtype).reshape(-1, *[1] * (path.states.ndim - 2))
    shown = path.eps, project(path.states) / size, project(path.foreseen)
    return Paths(ts[:-1], *map(to_host, shown))  # of which process 0 alone makes pictures
