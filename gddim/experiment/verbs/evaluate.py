"""The verb `evaluate`: a table of distances, samplers against network calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from etils import epath

from gddim.evaluation.cell import Cell
from gddim.evaluation.classes import Labelled, classes_in_words, classify
from gddim.evaluation.page import write_page
from gddim.evaluation.report import plot, table
from gddim.evaluation.sweep import RESULTS, read_rows, sweep
from gddim.experiment.checkpoints import checkpoint_digest, restore_ema
from gddim.experiment.drawing import draw_samples
from gddim.experiment.guiding import restore_guide
from gddim.experiment.measure import Measure
from gddim.experiment.outputs import check_names, write_json
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe
from gddim.parallel import tell
from gddim.samplers import LearnedTable
from gddim.samplers.words import sampler_name
from gddim.sde.words import process_name
from gddim.storage import write_whole


def evaluate(plan: Plan, workdir: epath.Path, cells: Sequence[Cell], step: int | None = None) -> None:
    """Fill the cells of a table by a checkpoint's averaged model; writes results.jsonl, and tables and plot of all that it
    holds."""
    experiment, settings = plan.experiment, plan.experiment.eval
    check_names(workdir, "classes")
    params, step = restore_ema(plan, workdir, step)
    guide = restore_guide(plan, workdir, step)
    measure, digest = Measure(plan, workdir), checkpoint_digest(params)
    for sampler in settings.samplers:
        if isinstance(sampler, LearnedTable) and (line := sampler.foreign(digest)):
            tell(line)
    rows = sweep(measure.evaluator(params, step, *guide), cells, workdir, measure.floor, settings.keep_samples)
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
