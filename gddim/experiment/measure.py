"""Where the samples of an experiment are measured, and against what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from gddim.checkpoint import checksums
from gddim.data import Source
from gddim.errors import UserError
from gddim.evaluation.cell import Cell, Evaluator, check
from gddim.evaluation.features import FeatureSpace, PixelFeatures
from gddim.evaluation.inception import InceptionFeatures
from gddim.evaluation.statistics import Statistics, cached_statistics
from gddim.experiment.config import Evaluation, Experiment
from gddim.experiment.plan import Plan
from gddim.parallel import batch_sharding

WATCHED = 5_000  # samples of an evaluation while training, at the most


def feature_space(settings: Evaluation) -> FeatureSpace:
    """The one that an evaluation asks for. Raises `UserError` where the weights are missing."""
    if settings.features == "pixels":
        return PixelFeatures()
    return InceptionFeatures.load(convention=settings.convention, precision=settings.precision)


def cells(experiment: Experiment) -> list[Cell]:
    """Those of the table, each with its seeds. Raises `UserError` for one that cannot be."""
    settings, sampling = experiment.eval, experiment.sampling
    found = [
        Cell(sampler, nfe, settings.samples, seed, sampling.power, sampling.t_min, sampling.last)
        for nfe in settings.nfe
        for sampler in settings.samplers
        for seed in range(sampling.seed, sampling.seed + settings.seeds)
    ]
    check([*found, *([watched(experiment)] if settings.every else [])], experiment.sde)
    shape = experiment.data.shape
    if settings.features == "inception" and not (len(shape) == 3 and shape[-1] in (1, 3)):
        raise UserError(f"Inception features need images of 1 or 3 channels, not {shape}: give --eval.features pixels")
    return found


def watched(experiment: Experiment) -> Cell:
    """The cell of sampling's own sampler, which is evaluated while training."""
    sampling, count = experiment.sampling, min(WATCHED, experiment.eval.samples)
    return Cell(sampling.sampler, sampling.nfe, count, sampling.seed, sampling.power, sampling.t_min, sampling.last)


def checkpoint_digest(params: PyTree) -> str:
    """Tells apart parameters that differ in any bit, whatever mesh they are on."""
    return hashlib.sha256(json.dumps(checksums(jax.tree.leaves(params))).encode()).hexdigest()[:16]


class Measure:
    """Feature space and reference statistics, kept in the workdir once they are computed.

    In pixels the reference is the held-out data, and what the training data reach against it is the floor; in Inception
    features it is the training data, as in published numbers, and there is no floor.
    """

    def __init__(self, plan: Plan, workdir: epath.Path):
        data, settings = plan.experiment.data, plan.experiment.eval
        self.plan, self.space = plan, feature_space(settings)

        def statistics(source: Source, part: str) -> Statistics:
            name, place = f"{type(data).__name__}, {part}", batch_sharding(plan.mesh)
            return cached_statistics(source, self.space, name, workdir / "statistics", place)

        pixels = settings.features == "pixels"
        self.floor = statistics(data.train(), "training") if pixels else None
        if settings.reference:
            self.reference = Statistics.load(epath.Path(settings.reference).expanduser())
            self.reference.check_space(self.space.name)
        else:
            self.reference = statistics(*((data.test(), "held out") if pixels else (data.train(), "training")))

    def evaluator(self, params: PyTree, step: int) -> Evaluator:
        """What draws samples of these averaged parameters and measures them."""
        experiment, mesh = self.plan.experiment, self.plan.mesh
        return Evaluator(
            self.plan.model(params),
            experiment.data.shape,
            self.space,
            self.reference,
            provenance={
                "experiment": experiment.name,
                "checkpoint": checkpoint_digest(params),
                "step": step,
                "weights": "EMA",
            },
            batch=-(-min(experiment.eval.batch, experiment.eval.samples) // mesh.size) * mesh.size,
            sharding=batch_sharding(mesh),
        )

    def watch(self, report: Callable[[int, str, dict[str, float]], None]) -> Callable[[int, Any], None]:
        """A function of a training step and its state that evaluates a few samples and reports how many, and what."""
        cell = watched(self.plan.experiment)
        return lambda step, state: report(
            step, f"{cell.samples:,} samples", self.evaluator(state.ema, step).run(cell)["metrics"]
        )
