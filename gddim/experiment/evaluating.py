"""The verb `evaluate`: a table of distances, samplers against network calls."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
from etils import epath

from gddim.checkpoint import checksums
from gddim.evaluation.cell import Cell, Evaluator
from gddim.evaluation.features import FeatureSpace, PixelFeatures
from gddim.evaluation.inception import InceptionFeatures
from gddim.evaluation.report import plot, table
from gddim.evaluation.statistics import source_statistics, write_whole
from gddim.evaluation.sweep import sweep
from gddim.experiment.classes import Labelled, classify, told
from gddim.experiment.drawing import draw_samples
from gddim.experiment.plan import Plan
from gddim.experiment.training import restore_ema
from gddim.parallel import batch_sharding


def evaluate(plan: Plan, workdir: epath.Path, step: int | None = None) -> None:
    """Compare samplers on a checkpoint's averaged model; writes results.jsonl, results.md and results.png.

    In pixels the samples are compared with the held-out data, beside what the training data reach; in Inception
    features with the training data, as published numbers are.
    """
    experiment, settings, sampling = plan.experiment, plan.experiment.eval, plan.experiment.sampling
    pixels = settings.features == "pixels"
    space: FeatureSpace = PixelFeatures() if pixels else InceptionFeatures.load()
    params, step = restore_ema(plan, workdir, step)
    model = plan.model(params)
    sharding = batch_sharding(plan.mesh)
    data, name = experiment.data, f"{type(experiment.data).__name__}"
    train = source_statistics(data.train(), space, f"{name}, training", sharding)
    test = source_statistics(data.test(), space, f"{name}, held out", sharding) if pixels else None
    digest = hashlib.sha256(json.dumps(checksums(jax.tree.leaves(params))).encode()).hexdigest()[:16]
    evaluator = Evaluator(
        model,
        data.shape,
        space,
        reference=test or train,
        provenance={"experiment": experiment.name, "checkpoint": digest, "step": step, "weights": "EMA"},
        batch=-(-settings.batch // plan.mesh.size) * plan.mesh.size,
        sharding=sharding,
    )
    cells = [
        Cell(sampler, nfe, settings.samples, sampling.seed, sampling.power, sampling.t_min, sampling.last)
        for nfe in settings.nfe
        for sampler in settings.samplers
    ]
    rows = sweep(evaluator, cells, workdir, floor=train if test else None)
    if jax.process_index() == 0:
        write_whole(workdir / "results.md", table(rows).encode())
        plot(rows, workdir / "results.png")
        print(table(rows), flush=True)
    if isinstance(data, Labelled):
        more = dataclasses.replace(sampling, samples=settings.samples, batch=settings.batch)
        found = classify(data, draw_samples(experiment, plan.mesh, model, more)[0])
        if jax.process_index() == 0:
            write_whole(workdir / "classes.json", json.dumps(found, indent=2).encode())
            print(told(found), flush=True)
