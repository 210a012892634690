"""What the verb `fit` is told, and what it makes of an experiment."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from gddim.errors import UserError, require
from gddim.samplers import Grid, Method, OnGrid
from gddim.samplers.fit import Family
from gddim.samplers.grids import BAND, Band
from gddim.samplers.method import check_methods
from gddim.samplers.solver import AbstractTableSampler
from gddim.samplers.words import sampler_name
from gddim.sde.words import process_name

if TYPE_CHECKING:
    from gddim.experiment.config import Experiment

SOLVERS = "solvers"  # in a workdir, the tables of its network


@dataclass(frozen=True)
class Fitting:
    """How `fit` learns the table of sampling's process and calls, from the sampler there on."""

    minutes: float = 5.0
    """At most, the teacher's run and compilation included; what was best by then is kept."""
    steps: int = 400
    """Of the gradient; 0: the grid alone is fitted."""
    batch: int = 64
    """Noises a step, over all devices, and at a time of the teacher."""
    pairs: int = 1024
    """Noises that gradients see."""
    held_out: int = 256
    """Others, on which the best is chosen, in whole batches."""
    teacher: int = 64
    """Network calls of the run that is aimed at, by the same sampler."""
    name: str | None = None
    """Of the file, solvers/NAME.npz in the workdir; without it the process and the calls, as cld-5."""

    def __post_init__(self):
        for field in ("batch", "pairs", "held_out", "teacher"):
            require(getattr(self, field) >= 1, f"{field} must be at least 1, not {getattr(self, field)}")
        require(self.steps >= 0, f"steps must be at least 0, not {self.steps}")
        require(0 < self.minutes < np.inf, f"minutes must be > 0, not {self.minutes}")
        require(
            self.name is None or bool(re.fullmatch(r"[\w.=+-]+", self.name)), f"name {self.name!r} is no file's name"
        )


class Problem(NamedTuple):
    """A fit that can be."""

    file: epath.Path
    family: Family
    grid: Float[np.ndarray, " n"]
    """The sampler's own."""
    teacher: Method


def fitted_by(experiment: Experiment, workdir: epath.Path) -> Problem:
    """What is fitted, and into which file. Raises `UserError` for a sampler that has no table to correct, and a file that is
    there.
    """
    settings, sampling = experiment.fit, experiment.sampling
    sde = experiment.through(sampling.process)
    word = process_name(sde)
    if len(word) > 60:  # the repr of one's own
        word = f"{type(sde).__name__}-{hashlib.sha256(word.encode()).hexdigest()[:8]}"
    name = settings.name or re.sub(r"[^\w.=+-]+", "-", f"{word}-{sampling.nfe}")
    file = workdir / SOLVERS / f"{name}.npz"
    require(not file.exists(), f"{file} is there, and is not overwritten: give another --fit.name")
    require(
        sampling.last == "none", f"sampling.last {sampling.last}: a table that is fitted has no last call: give none"
    )
    method = sampling.method(sde, experiment.data.shape)
    require(
        settings.teacher > sampling.nfe, f"fit.teacher {settings.teacher} must be more than sampling.nfe {sampling.nfe}"
    )
    teacher = Method(method.sampler, settings.teacher, method.power, method.t_min)
    check_methods([method, teacher], sde)
    sampler, grid = method.sampler, method.grid(sde)
    if isinstance(sampler, OnGrid):
        sampler, grid = sampler.sampler, sampler.times(sde, grid)
    refusal = f"sampler {sampler_name(sampling.sampler)}: fit corrects the table of one such as gddim:3:data:free@tuned"
    if not isinstance(sampler, AbstractTableSampler):
        raise UserError(refusal)
    std = np.ravel(OnGrid(method.sampler, Grid("band")).for_data(experiment.data.shape).noise_unit)[0]
    family = Family(sampler, sde, grid[0], grid[-1], Band.of(std, *BAND))
    try:
        family.table(grid)
    except ValueError as error:
        raise UserError(f"{refusal}: {error}") from error
    return Problem(file, family, grid, teacher)
