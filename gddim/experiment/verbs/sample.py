"""The verb `sample`: samples of a checkpoint, and pictures of how they come about."""

from __future__ import annotations

import time

import jax
from etils import epath

from gddim.errors import progress
from gddim.evaluation.figures import label_in_words, process_in_words
from gddim.evaluation.page import write_page
from gddim.experiment.checkpoints import checkpoint_digest, restore_ema
from gddim.experiment.drawing import draw_samples, follow
from gddim.experiment.outputs import check_names, write_figure, write_npz
from gddim.experiment.pictures import film, gallery, rows, trajectory
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe
from gddim.parallel import tell
from gddim.samplers import LearnedTable
from gddim.samplers.words import sampler_name
from gddim.sde.words import process_name

SAMPLES = ("samples", "samples", "trajectory", "denoise")  # the file of arrays, and the pictures
"""What the verb `sample` writes."""


def sample(plan: Plan, workdir: epath.Path, step: int | None = None) -> None:
    """Write samples of a checkpoint's averaged model and pictures of how they come about; tell NFE and images/s."""
    experiment, sampling = plan.experiment, plan.experiment.sampling
    check_names(workdir, *SAMPLES)
    params, step = restore_ema(plan, workdir, step)
    model = plan.model(params)
    if isinstance(sampling.sampler, LearnedTable) and (line := sampling.sampler.foreign(checkpoint_digest(params))):
        tell(line)
    sde = experiment.through(sampling.process)
    origin = {"experiment": experiment.name, "step": step, **describe(sampling)}
    drawn = [(time.perf_counter(), 0)]
    classes = experiment.drawn_classes(sampling)
    with progress(total=sampling.samples if classes is None else len(classes), unit="img") as bar:

        def advance(n: int) -> None:
            bar.update(n - bar.n)
            drawn.append((time.perf_counter(), n))

        data, calls = draw_samples(experiment, plan.mesh, model, sampling, advance)
    compiled = len(drawn) > 2  # the first batch waits for the compiler
    (began, before), (ended, after) = drawn[int(compiled)], drawn[-1]
    rate = f"{(after - before) / (ended - began):.4g} images/s" + ("" if compiled else ", compilation included")
    paths = follow(experiment, model, sampling, count=4 if data.ndim == 4 else 1000)
    if jax.process_index() == 0:
        run = f"{experiment.name}, step {step}"
        through = "" if sde == experiment.sde else f" through {process_name(sde)}"
        by = f"{label_in_words(sampler_name(sampling.sampler))}{through}, {calls:g} network calls"
        on = f"{process_in_words(process_name(sde))}, {len(paths.ts)} steps of order 1"
        write_npz(workdir / "samples.npz", data, origin, classes)
        if classes is not None and sampling.per_class and data.ndim == 4:
            each = classes[:: sampling.per_class]
            named = ["no class" if number < 0 else f"class {number}" for number in each]
            shown = rows(data.reshape(len(each), -1, *data.shape[1:]), f"{run}\n{by}", named)
        else:
            shown = gallery(data, f"{run}\n{by}")
        write_figure(workdir / "samples", shown, origin)
        write_figure(workdir / "trajectory", trajectory(sde, paths, f"{run}: {on}"), origin)
        write_figure(workdir / "denoise", film(paths, f"{run}\n{on}"), origin)
        write_page(workdir)
        print(
            f"{len(data)} samples of step {step} by {sampler_name(sampling.sampler)}{through}: NFE {calls:g}, "
            f"{rate}; {workdir}: samples.npz, samples.png, trajectory.png, denoise.png, report.html",
            flush=True,
        )
