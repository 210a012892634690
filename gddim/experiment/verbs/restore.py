"""The verb `restore`: held-out images from a linear measurement of them, by samples of their posterior."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from gddim.data import LABEL, Source, classes_of, data_alone, to_uint8, to_unit, x0_and_cond
from gddim.denoiser import Through
from gddim.errors import progress
from gddim.evaluation.figures import label_in_words
from gddim.evaluation.metrics import psnr, ssim
from gddim.evaluation.page import write_page
from gddim.experiment.checkpoints import restore_ema
from gddim.experiment.drawing import CallCount, draw_numbered
from gddim.experiment.guiding import restore_guide
from gddim.experiment.measure import held_out
from gddim.experiment.outputs import check_names, digest_of_data, origin_of_network, write_figure, write_json, write_npz
from gddim.experiment.pictures import rows
from gddim.experiment.plan import Plan
from gddim.experiment.restoration import Measuring, Restoration
from gddim.experiment.workdir import describe
from gddim.guidance import Measured
from gddim.measurements import Operator, least_norm
from gddim.model import seen_through
from gddim.parallel import to_host
from gddim.samplers.words import sampler_name
from gddim.sde.base import positions

Images = Float[np.ndarray, "..."]
NEIGHBOURS = 50_000  # records to train on among which the nearest is looked for


def restore(plan: Plan, workdir: epath.Path, settings: Restoration, step: int | None = None) -> None:
    """Measure held-out images, draw samples given what was measured; writes a picture, the samples, and what they are worth."""
    experiment, sampling = plan.experiment, plan.experiment.sampling
    name = f"restored-{(settings.task or '').replace(':', '-')}"
    check_names(workdir, name, name)
    source, train = held_out(experiment), data_alone(experiment.data.train())
    params, step = restore_ema(plan, workdir, step)
    guidance, _ = restore_guide(plan, workdir, step)
    sde = experiment.through(sampling.process)
    model: Any = guidance(seen_through(plan.model(params), sde))
    shape = tuple(experiment.data.shape)
    operator = settings.operator(shape)
    method = sampling.method(sde, shape)
    solver = method.solver(sde)

    count = min(settings.images, len(source))
    records, cond = x0_and_cond(source[np.arange(count)])
    truth, seed = to_unit(jnp.asarray(records)), jax.random.key(sampling.seed)
    if cond is not None and sampling.classes:  # or each record's own
        cond = {LABEL: np.asarray(sampling.class_of(np.arange(count), classes_of(experiment.data)))}
    b = jax.vmap(operator)(truth)
    b = to_host(b + settings.noise * jax.random.normal(jax.random.fold_in(seed, 2**31), b.shape))
    origin = origin_of_network(experiment, step, params, sampling)
    origin |= {"restore": describe(settings), "measured": digest_of_data(b)}  # by whatever mask the file held
    n = count * settings.samples
    each = jax.tree.map(lambda x: np.repeat(x, settings.samples, 0), {"measurement": b, "cond": cond})
    basis, rms = sde if positions(sde) else None, experiment.model.rms
    measured = Measured(model.denoiser, operator, b[0], settings.noise, settings.by, rms, settings.iterations, basis)
    with progress(total=n, unit="img") as bar:
        samples, made = draw_numbered(
            plan.mesh,
            Through(sde, Measuring(measured)),
            solver,
            shape,
            sampling,
            n,
            lambda x: jnp.clip(x, -1, 1) if plan.rounds else x,
            lambda m: bar.update(m - bar.n),
            each,
        )
    samples = samples.reshape(count, settings.samples, *shape)
    calls = CallCount(made, guidance.evaluations(sde, made, solver.times))
    truth, seen = to_host(truth), _shown(operator, b, shape)
    seen = np.clip(seen, -1, 1) if plan.rounds else seen
    nearest = _nearest(operator, b, train)
    each = [_worth(operator, *of) for of in zip(truth, b, samples, seen, nearest, strict=True)]
    mean = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
    if jax.process_index() == 0:
        run = f"{experiment.name}, step {step}: {settings.task}" + f", noise {settings.noise:g}" * bool(settings.noise)
        by = f"{settings.by}, {label_in_words(sampler_name(method.sampler))}, {made:g} network calls"
        strip = np.concatenate([truth[:, None], seen[:, None], samples], 1)
        write_figure(workdir / name, rows(strip, f"{run}: truth, what is seen, samples\n{by}"), origin)
        held = to_host(to_uint8(jnp.asarray(samples))) if plan.rounds else samples
        write_npz(workdir / f"{name}.npz", held, origin)
        report = {"nfe": calls.made, "evaluations": calls.evaluations, "mean": mean, "each": each}
        write_json(workdir / f"{name}.json", report, origin)
        write_page(workdir)
        worth = "{psnr:.2f} of a sample, {psnr_of_mean:.2f} of their mean, {psnr_measured:.2f} of what was measured"
        print(
            f"{count} held-out images at step {step}, {settings.samples} samples each, {settings.task} by {settings.by}: NFE "
            f"{calls}; PSNR {worth.format(**mean)}, {mean['psnr_nearest']:.2f} of the nearest record to train on; "
            f"{workdir}: {name}.png, {name}.json, {name}.npz, report.html",
            flush=True,
        )


def _worth(
    operator: Operator, truth: Images, b: Images, samples: Images, seen: Images, nearest: Images
) -> dict[str, float]:
    """What the samples of an image are worth, in numbers that need no network."""
    mean = samples.mean(0)
    off = np.asarray(jax.vmap(operator)(jnp.asarray(samples))) - b[None]
    return {
        "psnr": float(np.mean([psnr(x, truth) for x in samples])),
        "ssim": float(np.mean([ssim(x, truth) for x in samples])),
        "psnr_of_mean": psnr(mean, truth),
        "ssim_of_mean": ssim(mean, truth),
        "spread": float(np.sqrt(np.mean((samples - mean) ** 2))),
        "misfit": float(np.sqrt(np.mean(off**2))),
        "psnr_measured": psnr(seen, truth),
        "ssim_measured": ssim(seen, truth),
        "psnr_nearest": psnr(nearest, truth),
        "ssim_nearest": ssim(nearest, truth),
    }


def _shown(operator: Operator, b: Images, shape: tuple[int, ...]) -> Float[np.ndarray, "n h w c"]:
    """Measurements as images: as they are, where they are such, or the smallest image that is measured so."""
    if b.shape[1:] == shape:
        return b
    return to_host(jax.jit(jax.vmap(lambda b: least_norm(operator, b, shape)))(jnp.asarray(b)))


def _nearest(operator: Operator, b: Images, train: Source) -> Float[np.ndarray, "n h w c"]:
    """Of the records to train on, the first 50,000 at most, that which is measured most like each."""
    best, found = np.full(len(b), np.inf), np.zeros((len(b), *train.shape), np.float32)
    measured = jax.jit(lambda x: jax.vmap(operator)(to_unit(x)))
    end = min(len(train), NEIGHBOURS)
    for first in range(0, end, 1000):
        records = np.asarray(train[np.arange(first, min(first + 1000, end))])
        theirs = np.asarray(measured(records)).reshape(len(records), -1)
        for i, ours in enumerate(b.reshape(len(b), -1)):
            distance = ((theirs - ours) ** 2).sum(1)
            if distance.min() < best[i]:
                best[i], found[i] = distance.min(), to_host(to_unit(jnp.asarray(records[distance.argmin()])))
    return found
