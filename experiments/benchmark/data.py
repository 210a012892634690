"""How fast batches come."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.benchmark.table import Row, Target, one_core
from experiments.benchmark.training import h200_consumption
from gddim.data import ArraySource, Shards, Source, batches, prepare


@dataclasses.dataclass(frozen=True)
class Noise:
    """Images of the shape of CIFAR-10's, which the loader reads no differently."""

    records: int

    shape = (32, 32, 3)

    def train(self) -> ArraySource:
        rng = np.random.default_rng(0)
        return ArraySource(rng.integers(0, 256, (self.records, *self.shape), np.uint8), flip=True)

    def test(self) -> ArraySource:
        return ArraySource(np.zeros((1, *self.shape), np.uint8), flip=True)


def loader(records: int = 50_000, batch: int = 128, count: int = 300, repeats: int = 5) -> Iterator[Row]:
    """Images/s of the loader on one core, from memory and from ArrayRecord, and what an H200 would take."""
    noise = Noise(records)
    wanted = 20 * h200_consumption()
    with tempfile.TemporaryDirectory() as folder:
        prepare(noise, Path(folder, "shards"))
        for name, source in (
            ("memory", noise.train()),
            ("ArrayRecord", Shards(str(Path(folder, "shards"))).train()),
        ):
            rate = max(images_per_second(source, batch, count) for _ in range(repeats))
            title, baseline = f"loader on a core, from {name}, batch {batch}", "20 × an H200 training cld_cifar10"
            yield Row(title, rate, "images/s", baseline, wanted, Target("ratio", "≥", 1.0))


def images_per_second(source: Source, batch: int, count: int) -> float:
    """Of `count` batches after some to warm up."""
    with one_core():
        rows = batches(source, batch, seed=0)
        for _ in range(16):
            next(rows)
        start = time.perf_counter()
        for _ in range(count):
            next(rows)
        return batch * count / (time.perf_counter() - start)
