"""The verb `sample`, and the dry run."""

from __future__ import annotations

import json
import math
import time

import jax
from etils import epath
from tqdm import tqdm

from gddim.evaluation.figures import label_in_words, process_in_words
from gddim.evaluation.page import write_page
from gddim.evaluation.provenance import spell
from gddim.experiment.drawing import draw_samples, follow
from gddim.experiment.outputs import check_names, write_figure, write_npz
from gddim.experiment.pictures import film, gallery, trajectory
from gddim.experiment.plan import Plan
from gddim.experiment.verbs.train import restore_ema
from gddim.experiment.workdir import describe, flatten
from gddim.parallel import bytes_per_device
from gddim.samplers.words import sampler_name

SAMPLES = ("samples", "samples", "trajectory", "denoise")  # the file of arrays, and the pictures
"""What the verb `sample` writes."""


def dry_run(plan: Plan) -> None:
    """Print, on process 0, what a run would be and what it needs. Nothing is compiled and no array is made."""
    if jax.process_index() != 0:
        return
    experiment = plan.experiment
    for name, value in flatten(describe(experiment)):
        print(f"{name.removesuffix('.type')} = {json.dumps(value, ensure_ascii=False)}")
    total = plan.state_bytes
    facts = {
        "parameters": f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.shapes.model)):,}",
        "devices": f"{plan.mesh.size} × {plan.mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es)",
        "mesh": ", ".join(f"{axis} {n}" for axis, n in plan.mesh.shape.items()),
        "batch per device": f"{experiment.train.batch // plan.mesh.size}",
        "state": f"{total:,} bytes, {bytes_per_device(plan.shapes):,} on each device",
        "checkpoint": f"about {total / 2**20:,.1f} MiB",
        "FLOPs per image, forward": f"{plan.image_flops():,.0f}",
        "FLOPs per training step": f"{plan.step_flops():,.0f}",
    }
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    print("On paper, a training step on", *plan.on_paper(), sep="\n  ")


def sample(plan: Plan, workdir: epath.Path, step: int | None = None) -> None:
    """Write samples of a checkpoint's averaged model and pictures of how they come about; tell NFE and images/s."""
    experiment, sampling = plan.experiment, plan.experiment.sampling
    check_names(workdir, *SAMPLES)
    params, step = restore_ema(plan, workdir, step)
    model = plan.model(params)
    origin = {"experiment": experiment.name, "step": step, **describe(sampling)}
    drawn = [(time.perf_counter(), 0)]
    with tqdm(total=sampling.samples, unit="img", disable=None) as bar:

        def each(n: int) -> None:
            bar.update(n - bar.n)
            drawn.append((time.perf_counter(), n))

        data, calls = draw_samples(experiment, plan.mesh, model, sampling, each)
    compiled = len(drawn) > 2  # the first batch waits for the compiler
    (began, before), (ended, after) = drawn[int(compiled)], drawn[-1]
    rate = f"{(after - before) / (ended - began):.4g} images/s" + ("" if compiled else ", compilation included")
    paths = follow(experiment, model, sampling, count=4 if data.ndim == 4 else 1000)
    if jax.process_index() == 0:
        run = f"{experiment.name}, step {step}"
        by = f"{label_in_words(sampler_name(sampling.sampler))}, {calls:g} network calls"
        on = f"{process_in_words(spell(experiment.sde))}, {len(paths.ts)} steps of order 1"
        write_npz(workdir / "samples.npz", data, origin)
        write_figure(workdir / "samples", gallery(data, f"{run}\n{by}"), origin)
        write_figure(workdir / "trajectory", trajectory(experiment.sde, paths, f"{run}: {on}"), origin)
        write_figure(workdir / "denoise", film(paths, f"{run}\n{on}"), origin)
        write_page(workdir)
        print(
            f"{len(data)} samples of step {step} by {sampler_name(sampling.sampler)}: NFE {calls:g}, "
            f"{rate}; {workdir}: samples.npz, samples.png, trajectory.png, denoise.png, report.html",
            flush=True,
        )
