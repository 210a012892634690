"""Where the samples of an experiment are measured, and against what."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from gddim.data import Source, check_labels, class_counts, classes_of, cond_of, data_alone
from gddim.errors import UserError, place, require
from gddim.evaluation.cell import LEAST, Cell, Evaluator, check
from gddim.evaluation.classes import Labelled
from gddim.evaluation.features import FeatureSpace, PixelFeatures, check_numbers
from gddim.evaluation.figures import SUFFIXES
from gddim.evaluation.inception import InceptionFeatures
from gddim.evaluation.statistics import CLASSES, Statistics, cached_statistics
from gddim.evaluation.sweep import RESULTS, read_rows
from gddim.experiment.checkpoints import checkpoint_digest
from gddim.experiment.config import Evaluation, Experiment
from gddim.experiment.plan import Plan
from gddim.guidance import Guidance
from gddim.parallel import batch_sharding, round_up
from gddim.samplers import AbstractSampler, LearnedTable
from gddim.samplers.words import sampler_name
from gddim.sde import AbstractLinearSDE

PERIODIC = 5_000  # samples of an evaluation while training, at the most


def feature_space(settings: Evaluation) -> FeatureSpace:
    """The one that an evaluation asks for. Raises `UserError` where the weights are missing."""
    if settings.features == "pixels":
        return PixelFeatures()
    return InceptionFeatures.load(convention=settings.convention, precision=settings.precision)


def cells(experiment: Experiment, everywhere: Collection[str] = ()) -> list[Cell]:
    """Those of the table, each with its seeds; `everywhere` names what of sampling's times is of other processes, too.

    Raises `UserError` for one that cannot be.
    """
    settings, sampling = experiment.eval, experiment.sampling
    require(
        sampling.seed + settings.seeds + bool(settings.ema) <= 2**31,
        f"eval.seeds {settings.seeds}: from sampling.seed {sampling.seed} on they must be below 2³¹",
    )
    same = {name: getattr(sampling, name) for name in everywhere}
    through = lambda sde: replace(sampling.through(sde, experiment.sde), **same)
    shape = experiment.data.shape
    found = [
        Cell(replace(through(sde), sampler=sampler, nfe=nfe).method(sde, shape), settings.samples, seed, sde)
        for nfe in settings.nfe  # first, so that what ends early has the cheap ones of every process
        for sde in experiment.evaluated()
        for sampler in settings.samplers
        if _meets(sampler, sde, nfe - (sampling.last != "none"))
        for seed in range(sampling.seed, sampling.seed + settings.seeds)
    ]
    drawn = [cell.method.sampler for cell in found]
    for sampler in settings.samplers:
        if isinstance(sampler, LearnedTable) and sampler not in drawn:
            of = f"{sampler.about['process']} at {sampler.nfe(1)} calls"
            raise UserError(f"{sampler_name(sampler)} is of {of}, which is no cell of --eval.processes and --eval.nfe")
    check([*found, *([own_cell(experiment)] if settings.every or settings.ema else [])], experiment.sde)
    classes = settings.balance == "classes" or classes_of(experiment.data) > 0
    require(classes, f"eval.balance {settings.balance}: this run knows no classes; train one with --data.labels")
    if settings.features == "inception" and not (len(shape) == 3 and shape[-1] in (1, 3)):
        raise UserError(f"Inception features need images of 1 or 3 channels, not {shape}: give --eval.features pixels")
    return found


def _meets(sampler: AbstractSampler, sde: AbstractLinearSDE, nfe: int) -> bool:
    """Whether a sampler has a cell of a process and calls: a learned table has those of its own alone."""
    return not isinstance(sampler, LearnedTable) or (sampler.of(sde) and sampler.nfe(1) == nfe)


def own_cell(experiment: Experiment) -> Cell:
    """The cell of sampling's own sampler, of as many samples as those of the table."""
    sampling = experiment.sampling
    sde = experiment.through(sampling.process)
    return Cell(sampling.method(sde, experiment.data.shape), experiment.eval.samples, sampling.seed, sde)


def check_measurable(experiment: Experiment, workdir: epath.Path, train: Source | None = None) -> None:
    """Raise `UserError` for what a `Measure` and the table made with it would fail with; measures nothing.

    The data are looked at where `train`, those to train on, are given: they are measured much later, otherwise at once.
    """
    load_reference(experiment, feature_space(experiment.eval))
    written = [(workdir / RESULTS).with_suffix(suffix) for suffix in (".md", *SUFFIXES)]
    if (workdir / RESULTS).exists():
        read_rows(workdir / RESULTS)
    elif foreign := [path for path in written if path.exists()]:
        raise UserError(f"{foreign[0]} is of no {RESULTS} beside it and is not overwritten: move it away")
    if train is not None:
        measured_against(experiment, train)
        if isinstance(experiment.data, Labelled):
            experiment.data.known_classes()
            experiment.data.test()


def load_reference(experiment: Experiment, space: FeatureSpace) -> Statistics | None:
    """Those of `--eval.reference`. Raises `UserError` unless samples can be compared with them in this space."""
    text, shape = experiment.eval.reference, experiment.data.shape
    check_numbers(space, shape)
    if text is None:
        return None
    try:
        found = Statistics.load(place(text))
        found.check_space(space.name, shape)
    except UserError as error:
        raise UserError(f"--eval.reference: {error}") from error
    sample = jax.ShapeDtypeStruct((1, *shape), np.uint8 if len(shape) == 3 else np.float32)
    width, theirs = jax.eval_shape(space, sample).shape[1], len(found.moments.mean)
    if width != theirs:
        raise UserError(f"--eval.reference {text} has features of dimension {theirs}, samples {shape} have {width}")
    return found


def measured_against(experiment: Experiment, train: Source | None = None) -> dict[str, Source]:
    """The parts of the data that an evaluation reads, by name. Raises `UserError` where they are too few records, or
    those held out have another shape.
    """
    pixels, given = experiment.eval.features == "pixels", experiment.eval.reference
    found = {}
    if pixels or not given:
        found["training"] = experiment.data.train() if train is None else train
    if pixels and not given:
        found["held out"] = experiment.data.test()
        _check_shape(experiment, found["held out"])
    for part, source in found.items():
        check_labels(experiment.data, source, f"records that are {part}")
        if len(source) < LEAST:
            more = ": hold out more, or give --eval.reference" if part == "held out" else ""
            raise UserError(f"{len(source)} records are {part}, an evaluation needs at least {LEAST}{more}")
    few = 0 < classes_of(experiment.data) <= CLASSES
    return found if few else {part: data_alone(source) for part, source in found.items()}


def held_out(experiment: Experiment) -> Source:
    """The held-out records, with what conditions the network where anything does.

    Raises `UserError` for fewer than two.
    """
    source = experiment.data.test()
    source = source if cond_of(experiment.data) else data_alone(source)
    _check_shape(experiment, source)
    check_labels(experiment.data, source, "records that are held out")
    require(len(source) >= 2, f"{len(source)} records are held out, at least 2 are needed")
    return source


def _check_shape(experiment: Experiment, test: Source) -> None:
    shape = experiment.data.shape
    require(tuple(test.shape) == tuple(shape), f"records {test.shape} are held out, those to train on are {shape}")


class Measure:
    """Feature space and reference statistics, kept in the workdir once they are computed.

    In pixels the reference is the held-out data, and what the training data reach against it is the floor; in Inception
    features it is the training data, as in published numbers, and there is no floor.
    """

    def __init__(self, plan: Plan, workdir: epath.Path):
        data, settings = plan.experiment.data, plan.experiment.eval
        self.plan, self.space = plan, feature_space(settings)

        given, sources = load_reference(plan.experiment, self.space), measured_against(plan.experiment)

        def statistics(part: str) -> Statistics:
            name, sharding = f"{type(data).__name__}, {part}", batch_sharding(plan.mesh)
            return cached_statistics(sources[part], self.space, name, workdir / "statistics", sharding)

        pixels = settings.features == "pixels"
        self.floor = statistics("training") if pixels else None
        self.reference = given or statistics("held out" if pixels else "training")
        of_data = settings.balance == "data"
        self.counts = class_counts(data.train(), classes_of(data)) if of_data else None

    def evaluator(
        self,
        params: PyTree,
        step: int,
        guidance: Guidance | None = None,
        guide: dict[str, str] | None = None,
        ema: float | None = None,
    ) -> Evaluator:
        """What draws samples of these averaged parameters, of length `ema` or sampling's, and measures them; guided, with
        what tells the guide."""
        experiment, mesh = self.plan.experiment, self.plan.mesh
        length = experiment.sampling.ema if ema is None else ema
        return Evaluator(
            self.plan.model(params),
            experiment.data.shape,
            self.space,
            self.reference,
            provenance={
                "experiment": experiment.name,
                "checkpoint": checkpoint_digest(params),
                "step": step,
                "weights": f"EMA of σ_rel {length:g}" if length else "EMA",
                **(guide or {}),
            },
            guidance=guidance or Guidance(),
            classes=classes_of(experiment.data),
            counts=self.counts,
            rounds=self.plan.rounds,
            batch=round_up(min(experiment.eval.batch, experiment.eval.samples), mesh.size),
            sharding=batch_sharding(mesh),
        )

    def callback(self, report: Callable[[int, str, dict[str, float]], None]) -> Callable[[int, Any], None]:
        """A function of a training step and its state that evaluates a few samples and reports how many, and what."""
        cell, guide = own_cell(self.plan.experiment), self.plan.experiment.sampling.guide
        cell = replace(cell, samples=min(PERIODIC, cell.samples))

        def evaluated(step: int, state: Any) -> None:
            found = self.evaluator(state.ema, step, guide.away_from()).run(cell)
            report(step, f"{cell.samples:,} samples", found["metrics"])

        return evaluated
