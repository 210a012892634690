"""One cell of a table: samples of a model drawn, brought into a feature space and compared with a reference."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int, Int32

from gddim.data import LABEL, to_uint8
from gddim.errors import UserError
from gddim.evaluation.features import FeatureSpace
from gddim.evaluation.metrics import GOLDEN
from gddim.evaluation.provenance import hardware, software, stable_repr
from gddim.evaluation.statistics import CLASSES, Statistics, compare, features_of
from gddim.guidance import Guidance
from gddim.model import seen_through
from gddim.parallel import agree, to_host
from gddim.samplers.base import ProcessModel
from gddim.samplers.method import Method, check_methods
from gddim.samplers.numbered import sample_numbered
from gddim.samplers.solver import AbstractSolver, sharing
from gddim.samplers.words import LearnedTable, OnGrid, sampler_name
from gddim.sde import AbstractLinearSDE
from gddim.sde.words import process_name

Row = dict[str, Any]
ROUNDING = "to the nearest uint8, clipped"
LEAST = 4  # samples that every metric needs


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of a table: how samples are drawn, and which."""

    method: Method
    samples: int
    seed: int = 0
    sde: AbstractLinearSDE | None = None
    """The process, where it is not the model's own."""

    def describe(self) -> Row:
        """As JSON, but for the process; a sampler that chooses its own steps has one cell, whatever its budget."""
        method, sampler = self.method, self.method.sampler
        power = None if isinstance(sampler, OnGrid | LearnedTable) else method.power
        return {
            "sampler": sampler_name(sampler), "nfe": method.budget, "samples": self.samples, "seed": self.seed,
            "power": power, "t_min": method.t_min, "last": method.last, "parameters": stable_repr(sampler),
        }  # fmt: skip


def check(cells: Sequence[Cell], sde: AbstractLinearSDE) -> None:
    """Raise `UserError` for what a cell would fail with: too few samples, or what `check_methods` finds.

    `sde` is the process of the cells that have none.
    """
    methods: dict[AbstractLinearSDE, list[Method]] = {}
    for cell in cells:
        if cell.samples < LEAST:
            raise UserError(f"samples: {cell.samples} given, an evaluation needs at least {LEAST}")
        methods.setdefault(cell.sde or sde, []).append(cell.method)
    for process, each in methods.items():
        try:
            check_methods(each, process)
        except UserError as error:
            raise UserError(f"{process_name(process)}: {error}" if len(methods) > 1 else str(error)) from error


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What the cells of a sweep share: a model with a `.sde`, the shape of a record, a reference, a feature space.

    `provenance` says where the model comes from (checkpoint digest, step, EMA or raw). `batch` samples are drawn at a
    time, sharded by `sharding`; either changes samples by rounding alone. Images are rounded to uint8 before features
    are taken, as saving and reading them would. Raises `UserError` when the reference was taken in another feature space.
    """

    model: ProcessModel
    shape: tuple[int, ...]
    space: FeatureSpace
    reference: Statistics
    provenance: Row
    batch: int = 128
    sharding: jax.sharding.Sharding | None = None
    classes: int = 0
    """Of a model that is told them: without `counts` sample i is of class i mod classes, as many of each."""
    counts: Int[np.ndarray, " classes"] | None = None
    """How many records the data have of each, where samples are of them as often."""
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    """What guides the model."""
    rounds: bool = True
    """Whether records `(H, W, C)` are images of bytes, and not floating fields, which are measured as they are."""

    def __post_init__(self) -> None:
        self.reference.check_space(self.space.name, self.shape)

    @functools.cached_property
    def origin(self) -> Row:
        """All that decides the numbers of a cell of the model's own process but the cell itself."""
        return self.provenance | {
            "process": stable_repr(self.model.sde),
            "model": type(self.model).__name__,
            "features": self.space.name,
            "reference": self.reference.origin | {"digest": self.reference.digest()},
            "rounding": ROUNDING if self.rounds and len(self.shape) == 3 else "none",
            **({"classes": f"i mod {self.classes}" if self.counts is None else "as the data"} if self.classes else {}),
            **software(),
        }

    def key(self, cell: Cell) -> Row:
        """What a cell is and all that decides its numbers: its row but for the numbers."""
        sde = cell.sde or self.model.sde
        described = cell.describe() | {"process": process_name(sde)}
        return {"cell": described, "provenance": self.origin | {"process": stable_repr(sde)}}

    def run(
        self,
        cell: Cell,
        state: os.PathLike | None = None,
        save_every: float = 30.0,
        keep: Callable[[int, np.ndarray], None] | None = None,
        advance: Callable[[int], object] = lambda samples: None,
    ) -> Row:
        """The row of one cell. `state` is a file for its progress, written at most every `save_every` seconds.

        `keep(first, samples)` receives the samples drawn, `advance(samples)` how many were. Samples that are not finite
        end the cell: its row has no metrics, and tells which.
        """
        key = self.key(cell)
        origin = {"features": self.space.name, "cell": digest_of(key), "kept": keep is not None}
        found, calls, before = _resume(state, origin)
        first = found.count if found else 0
        advance(first)
        model = self.guidance(seen_through(self.model, cell.sde) if cell.sde else self.model)
        solver = sharing(cell.method.solver(model.sde))
        began = saved = time.perf_counter()
        rate = _Rate(began)
        for start, x, features, made, finite in self._ahead(cell, model, solver, first):
            n = min(self.batch, cell.samples - start)
            if lost := n - int(to_host(finite)[:n].sum()):
                which = f"{lost} of samples {start} to {start + n - 1}"
                measured = {"nfe": float(to_host(made)[:n].mean()), "devices": hardware(), "not_finite": which}
                return key | {"metrics": {}, "measured": measured}
            labels = self._labels(np.arange(start, start + n, dtype=np.int32)) if self.classes <= CLASSES else None
            part = Statistics.of(to_host(features)[:n], self.space, start, origin, labels)
            found = found.then(part) if found else part
            calls += int(to_host(made)[:n].sum())
            if keep:
                keep(start, to_host(x)[:n])
            advance(n)
            rate.add(n)
            if state and time.perf_counter() - saved >= save_every and found.count < cell.samples:
                seconds = before + time.perf_counter() - began
                if jax.process_index() == 0:
                    dataclasses.replace(found, origin=origin | {"calls": calls, "seconds": seconds}).save(state)
                saved = time.perf_counter()
        assert found is not None
        measured = {
            "nfe": (nfe := calls / cell.samples),
            **self._evaluations(model.sde, solver, nfe),
            "seconds": before + time.perf_counter() - began,
            "images_per_second": rate.value(),
            "devices": hardware(),
        }
        return key | {"metrics": compare(found, self.reference, self.space.metrics), "measured": measured}

    def _labels(self, numbers: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"] | None:
        if self.counts is None:
            return numbers % np.int32(self.classes) if self.classes else None
        shares = numbers * GOLDEN % 1  # evenly spread over [0, 1), however many there are
        return np.searchsorted(np.cumsum(self.counts), shares * self.counts.sum(), side="right").astype(np.int32)

    def _evaluations(self, sde: AbstractLinearSDE, solver: AbstractSolver, nfe: float) -> Row:
        """How often a guided sample evaluates a network in its calls."""
        found = self.guidance.evaluations(sde, nfe, solver.times)
        return {"evaluations": found} if found != nfe else {}

    def _ahead(
        self, cell: Cell, model: ProcessModel, solver: AbstractSolver, first: int
    ) -> Iterator[tuple[int, Array, Array, Array, Array]]:
        """Number, samples, features, network calls and finiteness of each batch; the devices have the next one by then."""
        pending = None
        for start in range(first, cell.samples, self.batch):
            rows = np.arange(start, start + self.batch, dtype=np.int32)
            labels = self._labels(rows)
            indices, cond = jax.device_put((rows, None if labels is None else {LABEL: labels}), self.sharding)
            seed = jnp.asarray(cell.seed, jnp.int32)
            drawn = sample_numbered(model, solver, self.shape, seed, indices, cond=cond)
            x = to_uint8(drawn.data) if self.rounds and len(self.shape) == 3 else drawn.data
            devices = self.sharding.num_devices if self.sharding else 1
            pending, ready = (start, x, features_of(self.space, x, devices), drawn.calls, drawn.finite), pending
            if ready:
                yield ready
        if pending:
            yield pending


def digest_of(row: Row) -> str:
    """Names a row by all that decides its numbers."""
    key = json.dumps({part: row[part] for part in ("cell", "provenance")}, sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _resume(state: os.PathLike | None, origin: Row) -> tuple[Statistics | None, int, float]:
    """What a cell had reached: its statistics, network calls and seconds. A damaged file is as good as none, and so is
    one that not all processes see.
    """
    reached = None, 0, 0.0
    if state and epath.Path(state).exists():
        with contextlib.suppress(UserError):
            found = Statistics.load(state)
            calls, seconds = found.origin.pop("calls"), found.origin.pop("seconds")
            if found.origin == origin:
                reached = found, calls, seconds
    same = agree(reached[0].count if reached[0] else 0, lambda counts: len(set(counts.tolist())) == 1)
    return reached if same else (None, 0, 0.0)


class _Rate:
    """Samples a second, the first batch with its compilation left out where there are more."""

    def __init__(self, began: float):
        self._began, self._count, self._first = began, 0, None

    def add(self, n: int) -> None:
        self._count += n
        self._last = time.perf_counter()
        self._first = self._first or (self._last, n)

    def value(self) -> float:
        if self._first is None:
            return 0.0
        began, skipped = (self._began, 0) if self._count == self._first[1] else self._first
        return (self._count - skipped) / (self._last - began)
