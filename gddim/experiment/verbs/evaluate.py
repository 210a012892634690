"""The verb `evaluate`: a table of distances, samplers against network calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from gddim.evaluation.cell import Cell
from gddim.evaluation.classes import Labelled, classes_in_words, classify
from gddim.evaluation.page import write_page
from gddim.evaluation.report import plot, table
from gddim.evaluation.sweep import RESULTS, read_rows, sweep
from gddim.experiment.checkpoints import checkpoint_digest, restore_ema
from gddim.experiment.drawing import draw_samples
from gddim.experiment.guiding import restore_guide
from gddim.experiment.measure import Measure, own_cell
from gddim.experiment.outputs import check_names, write_json
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe
from gddim.guidance import Guidance
from gddim.parallel import agree, tell
from gddim.samplers import LearnedTable
from gddim.samplers.words import sampler_name
from gddim.sde.words import process_name
from gddim.storage import write_whole


def _best_length(
    plan: Plan, workdir: epath.Path, step: int | None, measure: Measure, guide: tuple[Guidance, dict[str, str]]
) -> float:
    """Of `eval.ema` the length with the least distance of samples that the table has not; the rows are kept in `ema`."""
    lengths, distances, cell = plan.experiment.eval.ema, [], own_cell(plan.experiment)
    cell = dataclasses.replace(cell, seed=cell.seed + plan.experiment.eval.seeds)
    for ema in lengths:
        evaluator = measure.evaluator(*restore_ema(plan, workdir, step, ema), *guide, ema=ema)
        rows = sweep(evaluator, [cell], workdir / "ema")
        distances.append(rows[0]["metrics"].get("frechet", math.inf) if rows else math.inf)  # all are on process 0
    best = lengths[int(agree(np.argmin(distances)))]
    found = ", ".join(f"{ema:g}: {distance:.4g}" for ema, distance in zip(lengths, distances, strict=True))
    tell(f"average of σ_rel {best:g} has the least distance in seed {cell.seed} ({found})")
    return best


def evaluate(plan: Plan, workdir: epath.Path, cells: Sequence[Cell], step: int | None = None) -> None:
    """Fill the cells of a table by a checkpoint's averaged model; writes results.jsonl, and tables and plot of all that it
    holds."""
    experiment, settings = plan.experiment, plan.experiment.eval
    check_names(workdir, "classes")
    ema = settings.ema[0] if settings.ema else experiment.sampling.ema
    params, at = restore_ema(plan, workdir, step, ema)
    guide, measure = restore_guide(plan, workdir, at), Measure(plan, workdir)
    if len(settings.ema) > 1:
        ema = _best_length(plan, workdir, step, measure, guide)
        params, at = restore_ema(plan, workdir, step, ema)
    step, digest = at, checkpoint_digest(params)
    for sampler in settings.samplers:
        if isinstance(sampler, LearnedTable) and (line := sampler.foreign(digest)):
            tell(line)
    evaluator = measure.evaluator(params, step, *guide, ema=ema)
    rows = sweep(evaluator, cells, workdir, measure.floor, settings.keep_samples)
    if jax.process_index() == 0:
        every = read_rows(workdir / RESULTS)  # also of other checkpoints, and in other features
        write_whole(workdir / "results.md", table(every).encode())
        plot(every, workdir / "results.png")
        print(table(rows), flush=True)
    if isinstance(experiment.data, Labelled):
        more = dataclasses.replace(
            experiment.sampling, samples=settings.samples, batch=settings.batch, classes=(), per_class=0
        )
        drawn, _ = draw_samples(plan, plan.model(params), more, guidance=guide[0])
        found = classify(experiment.data, drawn, experiment.drawn_classes(more))
        sde = experiment.through(more.process)
        method = more.method(sde, experiment.data.shape)
        about = {
            "experiment": experiment.name, "step": step, "checkpoint": digest, **guide[1],
            "process": process_name(sde), "sampler": sampler_name(method.sampler), "nfe": more.nfe,
        }  # fmt: skip
        if jax.process_index() == 0:
            write_json(workdir / "classes.json", about | found, describe(more) | about)
            print(classes_in_words(found), flush=True)
    if jax.process_index() == 0:
        write_page(workdir)
