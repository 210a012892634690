"""The verb `train`: a run from its newest checkpoint to its last step."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from functools import partial

import jax
from etils import epath

from gddim.checkpoint import Checkpointer
from gddim.data import Records, Source, batches, prefetch
from gddim.errors import UserError
from gddim.experiment.checkpoints import Start, checkpoints, items_of, start
from gddim.experiment.drawing import draw_samples
from gddim.experiment.measure import Measure
from gddim.experiment.outputs import write_figure
from gddim.experiment.pictures import gallery, pixels
from gddim.experiment.plan import Plan
from gddim.experiment.snapshots import drop_snapshots, snapshot
from gddim.experiment.workdir import describe
from gddim.logs import Log
from gddim.parallel import PreemptionGuard, global_batch, mesh_in_words, peak_flops
from gddim.train import TrainState, next_step, train


class Preempted(Exception):
    """A signal, or the end of its time, ended training; the state is saved, and the same command continues."""


def run_training(
    plan: Plan, source: Source, workdir: epath.Path, peak: float | None = None, borrowed: Start | None = None
) -> None:
    """Train to the last step, from the newest whole checkpoint if there is one. Raises `Preempted` or `Diverged`.

    Where there is none it begins with what was `borrowed` from another run, or fresh. `peak` is the FLOP/s of one
    device, where they are not known by its name.
    """
    experiment, settings = plan.experiment, plan.experiment.train
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(PreemptionGuard(60 * settings.minutes or math.inf))
        saved = stack.enter_context(contextlib.closing(checkpoints(experiment, workdir)))
        step, state, notes = start(plan, saved, borrowed)
        main = jax.process_index() == 0
        log = Log(
            str(workdir / "tensorboard"),
            step=step,
            steps=settings.steps,
            batch=settings.batch,
            chips=plan.mesh.size,
            full_rate=_full_rate(plan, peak) if main else None,
            quiet=not main,
        )
        stack.callback(log.close)
        log.say(mesh_in_words(plan.mesh, state))
        for note in notes:
            log.say(note)
        if step >= settings.steps:
            log.say(f"trained already: {step} steps")
            if not saved.any():  # it was borrowed
                saved.save(step, items_of(state), describe(experiment))
        else:
            step, state = _go_on(plan, source, workdir, log, saved, guard, step, state)
        if settings.snapshot_every and step:
            snapshot(plan, workdir, step, state)  # of a trained run too: the last one may have been cut short
    if step < settings.steps:
        raise Preempted(f"saved at step {step} of {settings.steps}" if step else "stopped before the first step")
    if guard.ended():
        raise Preempted(f"trained, {step} steps")


def _go_on(
    plan: Plan,
    source: Source,
    workdir: epath.Path,
    log: Log,
    saved: Checkpointer,
    guard: PreemptionGuard,
    step: int,
    state: TrainState,
) -> tuple[int, TrainState]:
    """Train from a step to the last one, or until the guard says so; what was reached is saved."""
    experiment, settings, main = plan.experiment, plan.experiment.train, jax.process_index() == 0
    if main and (left := drop_snapshots(workdir, step)):
        log.say(f"snapshots after step {step}, of what was not saved, are deleted: steps {', '.join(map(str, left))}")
    log.say(f"training from step {step} to {settings.steps} on {len(source):,} records {source.shape}")
    log.text("experiment", json.dumps(describe(experiment), indent=2))

    def save(step: int, state: TrainState) -> None:
        saved.save(step, items_of(state), describe(experiment))

    def show(step: int, state: TrainState) -> None:
        samples, _ = draw_samples(plan, plan.model(state.ema), experiment.sampling)
        picture = gallery(samples, f"{experiment.name}, step {step:,} of {settings.steps:,}")
        log.image(step, "samples", pixels(picture))
        if main:
            path, origin = workdir / "training" / f"{step:08}", {"experiment": experiment.name, "step": step}
            try:
                path.parent.mkdir(exist_ok=True)
                write_figure(path, picture, origin | describe(experiment.sampling))
                log.say(f"samples of step {step}: {path}.png")
            except (OSError, UserError) as error:  # no reason to end a training
                log.say(f"no samples of step {step}: {error}")

    keep, snapshots, every = partial(snapshot, plan, workdir), settings.snapshot_every, experiment.eval.every
    evaluations = [(every, Measure(plan, workdir).callback(log.metrics))] if every else []
    if snapshots and step:
        keep(step, state)
    rows = batches(source, settings.batch, experiment.seed, step, jax.process_index(), jax.process_count())
    grouped = _group(rows, step, settings.steps, settings.fused)
    with contextlib.closing(prefetch(grouped, lambda group: global_batch(group, plan.mesh))) as placed:
        return train(
            state,
            plan.update(source.flip),
            placed,
            step=step,
            steps=settings.steps,
            fused=settings.fused,
            log=log,
            report_every=settings.report_every,
            save=save,
            save_every=settings.save_every,
            callbacks=[(settings.show_every, show), (snapshots, keep), *evaluations],
            stop=guard.reached,
        )


def _full_rate(plan: Plan, peak: float | None) -> float | None:
    """Images/s of a device that does nothing but the model's arithmetic: three forward passes an image, in training."""
    peak = peak or peak_flops(plan.mesh.devices.flat[0].device_kind)
    rate = peak / (3 * plan.image_flops()) if peak else math.nan
    return rate if math.isfinite(rate) else None


def _group(rows: Iterator[Records], step: int, steps: int, fused: int) -> Iterator[Records | list[Records]]:
    """The batches of each dispatch: one, or a list of as many as steps are fused."""
    while step < steps:
        after = next_step(step, steps, fused)
        yield next(rows) if fused == 1 else list(itertools.islice(rows, after - step))
        step = after
