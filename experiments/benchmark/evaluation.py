"""What an evaluation costs beside the sampler and the feature network."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cld_cifar10_denoiser, cld_digits
from experiments.benchmark.table import Row, Target, interleaved, on_cpu
from experiments.benchmark.training import resized
from gddim.data import CIFAR10, Source, to_uint8
from gddim.errors import UserError
from gddim.evaluation.cell import Cell, Evaluator
from gddim.evaluation.features import FeatureSpace, PixelFeatures
from gddim.evaluation.inception import InceptionFeatures
from gddim.evaluation.statistics import SUBSET, Statistics, compare, features_of, source_statistics
from gddim.experiment import Experiment
from gddim.samplers import GDDIM, Method
from gddim.samplers.numbered import sample_numbered

FULL = 50_000  # samples of a published cell


def evaluation(samples: int = 0, batch: int = 0) -> Iterator[Row]:
    """A cell of the digits in pixels, and one of CIFAR-10's shape in Inception features where the weights are there."""
    digits = cld_digits.EXPERIMENT
    yield from cell_rows(digits, PixelFeatures(), digits.data.test(), samples or 500, batch or 250, "pixels", 500)
    try:
        space = InceptionFeatures.load(), CIFAR10().test()
    except UserError as error:
        raise UserError(f"no Inception network ({error})") from error
    experiment = cld_cifar10_denoiser.EXPERIMENT
    small: dict[str, Any] = dict(width=16, multipliers=(1, 1), blocks=1) if on_cpu() else dict(dtype="bfloat16")
    experiment = resized(experiment, **small)
    size = batch or (100 if on_cpu() else 1000)
    yield from cell_rows(experiment, *space, samples or (2 if on_cpu() else 8) * size, size, "Inception", FULL)


def cell_rows(
    experiment: Experiment,
    space: PixelFeatures | InceptionFeatures,
    source: Source,
    samples: int,
    batch: int,
    name: str,
    of: int,
    repeats: int = 4,
) -> Iterator[Row]:
    """Features/s, and the share of a cell of `of` samples outside sampler and feature network, from one of `samples`."""
    model = experiment.build(jax.random.key(0))
    head = _Head(source, min(len(source), 2 * batch))
    reference = source_statistics(head, space, "the first records", progress=False)
    cell = Cell(Method(GDDIM(3, interpolate="data"), 50), samples)
    streaming = dataclasses.replace(space, metrics=())  # their time would hide that of the stream
    evaluator = Evaluator(model, experiment.data.shape, streaming, reference, {}, batch)
    solver = cell.method.solver(experiment.sde)
    records = jnp.asarray(head[np.arange(batch) % len(head)])

    def bare() -> list[jax.Array]:
        numbers = [jnp.arange(first, first + batch, dtype=jnp.int32) for first in range(0, samples, batch)]
        drawn = [sample_numbered(model, solver, experiment.data.shape, jnp.asarray(0), each).data for each in numbers]
        return [features_of(space, to_uint8(x)) for x in drawn]

    alone, whole, features = interleaved(
        bare, lambda: evaluator.run(cell) and None, lambda: features_of(space, records), repeats=repeats
    )
    full = _metrics_of_many(space, reference, min(of, SUBSET))
    outside = max(whole - alone, 0.0) * of / samples + full
    streamed = max(whole, alone) * of / samples
    yield Row(f"features/s, {name}, {batch} at a time", batch / features, "images/s")
    yield Row(f"metrics of {of:,} samples, {name}", full, "s")
    title = f"{of:,} samples, NFE {cell.method.nfe}, {name}: outside sampler and features"
    yield Row(title, outside, "s", "the whole cell", streamed + full, Target("ratio", "≤", 0.05))


def _metrics_of_many(space: FeatureSpace, like: Statistics, count: int) -> float:
    """Seconds that the metrics take on so many features."""
    noise = np.random.default_rng(0).random((count, like.subset.shape[1]), np.float32)
    many = Statistics.of(noise, space, 0, like.origin)
    start = time.perf_counter()
    compare(many, many, space.metrics)
    return time.perf_counter() - start


class _Head:
    """The first records of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, count
        self.shape, self.dtype, self.flip = source.shape, source.dtype, source.flip

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray:
        return self._source[indices]
