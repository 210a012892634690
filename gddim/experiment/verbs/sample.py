"""The verb `sample`: samples of a checkpoint, and pictures of how they come about."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gddim.data import to_uint8, to_unit
from gddim.errors import progress
from gddim.evaluation.figures import label_in_words, process_in_words
from gddim.evaluation.page import write_page
from gddim.experiment.checkpoints import restore_ema
from gddim.experiment.drawing import NoisedData, draw_samples, follow
from gddim.experiment.guiding import restore_guide
from gddim.experiment.outputs import check_names, digest_of_data, origin_of_network, write_figure, write_npz
from gddim.experiment.pictures import film, gallery, rows, trajectory
from gddim.experiment.plan import Plan
from gddim.samplers.words import sampler_name
from gddim.sde.words import process_name

SAMPLES = ("samples", "samples", "trajectory", "denoise")  # the file of arrays, and the pictures
"""What the verb `sample` writes."""
FLOW = 64  # steps of the paths that pictures show


def sample(plan: Plan, workdir: epath.Path, step: int | None = None, start: NoisedData | None = None) -> None:
    """Write samples of a checkpoint's averaged model and pictures of how they come about, or of given data; tell NFE and
    images/s.
    """
    experiment, sampling = plan.experiment, plan.experiment.sampling
    check_names(workdir, *SAMPLES)
    params, step = restore_ema(plan, workdir, step)
    guidance, _ = restore_guide(plan, workdir, step)
    model = plan.model(params)
    sde = experiment.through(sampling.process)
    origin = origin_of_network(experiment, step, params, sampling)
    if start is not None:
        origin["start"] = {"data": digest_of_data(start.data), "time": start.time}
    ts = sampling.flow_grid(sde, experiment.data.shape, FLOW) if start is None else None
    drawn = [(time.perf_counter(), 0)]
    classes = experiment.drawn_classes(sampling)
    with progress(total=sampling.samples if classes is None else len(classes), unit="img") as bar:

        def advance(n: int) -> None:
            bar.update(n - bar.n)
            drawn.append((time.perf_counter(), n))

        data, calls = draw_samples(plan, model, sampling, advance, guidance, start)
    compiled = len(drawn) > 2  # the first batch waits for the compiler
    (began, before), (ended, after) = drawn[int(compiled)], drawn[-1]
    rate = f"{(after - before) / (ended - began):.4g} images/s" + ("" if compiled else ", compilation included")
    if jax.process_index() == 0:
        write_npz(workdir / "samples.npz", data, origin, classes)
    count = 1000 if data.ndim == 2 else 4
    paths = None if ts is None else follow(experiment, model, sampling, guidance, count, ts)
    if jax.process_index() == 0:
        run = f"{experiment.name}, step {step}"
        through = "" if sde == experiment.sde else f" through {process_name(sde)}"
        guide = f", guided by {sampling.guide}" if sampling.guide.acts else ""
        sampler = sampler_name(sampling.method(sde, experiment.data.shape).sampler)
        by = f"{label_in_words(sampler)}{through}, {calls.made:g} network calls{guide}"
        from_data = "" if start is None else f", from data noised to t = {start.time:.3g}"
        by += from_data
        on = "" if paths is None else f"{process_in_words(process_name(sde))}, {len(paths.ts)} steps of order 1{guide}"
        if classes is not None and sampling.per_class and data.ndim == 4:
            each = classes[:: sampling.per_class]
            named = ["no class" if number < 0 else f"class {number}" for number in each]
            shown = rows(data.reshape(len(each), -1, *data.shape[1:]), f"{run}\n{by}", named)
        elif start is not None and data.ndim == 4 and len(data) % len(start.data) == 0:
            each = data.reshape(len(start.data), -1, *data.shape[1:])
            begun = to_unit(jnp.asarray(start.data))
            begun = np.asarray(to_uint8(begun) if plan.rounds else begun)
            shown = rows(np.concatenate([begun[:, None], each], 1), f"{run}: given data, and samples\n{by}")
        else:
            shown = gallery(data, f"{run}\n{by}")
        write_figure(workdir / "samples", shown, origin)
        if paths is not None:
            write_figure(workdir / "trajectory", trajectory(sde, paths, f"{run}: {on}"), origin)
            write_figure(workdir / "denoise", film(paths, f"{run}\n{on}"), origin)
        write_page(workdir)
        print(
            f"{len(data)} samples of step {step} by {sampler}{through}{guide}{from_data}: NFE {calls}, "
            f"{rate}; {workdir}: samples.npz, samples.png, {'trajectory.png, denoise.png, ' if paths else ''}report.html",
            flush=True,
        )
