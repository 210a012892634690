"""The verb `train`: a run from its newest checkpoint to its last step."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
from etils import epath
from jaxtyping import PyTree

from gddim.checkpoint import Checkpointer
from gddim.data import Records, Source, batches, prefetch
from gddim.errors import UserError
from gddim.experiment.config import MAY_CHANGE, Experiment
from gddim.experiment.drawing import draw_samples
from gddim.experiment.measure import Measure
from gddim.experiment.pictures import gallery, pixels
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe, differences
from gddim.logs import Log
from gddim.parallel import PreemptionGuard, global_batch, peak_flops
from gddim.parallel import describe as describe_mesh
from gddim.train import TrainState, next_step, train


class Preempted(Exception):
    """A signal ended training; the state is saved, and the same command continues."""


class Start(NamedTuple):
    """Where training begins: a step, the state there, and what is to be told of it."""

    step: int
    state: TrainState
    told: tuple[str, ...] = ()


def checkpoints(experiment: Experiment, workdir: epath.Path) -> Checkpointer:
    """Those of the run in a workdir."""
    settings = experiment.train
    return Checkpointer(workdir / "checkpoints", keep_last=settings.keep, keep_every=settings.keep_every or None)


def run_training(
    plan: Plan, source: Source, workdir: epath.Path, peak: float | None = None, borrowed: Start | None = None
) -> None:
    """Train to the last step, from the newest whole checkpoint if there is one. Raises `Preempted` or `Diverged`.

    Where there is none it begins with what was `borrowed` from another run, or fresh. `peak` is the FLOP/s of one
    device, where they are not known by its name.
    """
    experiment, settings = plan.experiment, plan.experiment.train
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(PreemptionGuard())
        saved = stack.enter_context(contextlib.closing(checkpoints(experiment, workdir)))
        step, state, told = _start(plan, saved, borrowed)
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
        log.say(describe_mesh(plan.mesh, state))
        for line in told:
            log.say(line)
        if step >= settings.steps:
            log.say(f"trained already: {step} steps")
            return
        log.say(f"training from step {step} to {settings.steps} on {len(source):,} records {source.shape}")
        log.text("experiment", json.dumps(describe(experiment), indent=2))
        rows = batches(source, settings.batch, experiment.seed, step, jax.process_index(), jax.process_count())
        grouped = _group(rows, step, settings.steps, settings.fused)
        placed = prefetch(grouped, lambda group: global_batch(group, plan.mesh))
        stack.callback(placed.close)

        def save(step: int, state: TrainState) -> None:
            saved.save(step, items_of(state), describe(experiment))

        def show(step: int, state: TrainState) -> None:
            samples, _ = draw_samples(experiment, plan.mesh, plan.model(state.ema), experiment.sampling)
            log.image(step, "samples", pixels(gallery(samples)))

        every = experiment.eval.every
        watched = [(every, Measure(plan, workdir).watch(log.metrics))] if every else []
        step, _ = train(
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
            callbacks=[(settings.show_every, show), *watched],
            stop=guard.reached,
        )
    if step < settings.steps:
        raise Preempted(f"saved at step {step} of {settings.steps}" if step else "stopped before the first step")


def restore_ema(plan: Plan, workdir: epath.Path, step: int | None = None) -> tuple[PyTree, int]:
    """The averaged parameters of a checkpoint, the newest whole one if no step is given, and its step."""
    with contextlib.closing(checkpoints(plan.experiment, workdir)) as saved:
        items, step = saved.restore({"ema": plan.shapes.ema}, step)
    return items["ema"], step


def _full_rate(plan: Plan, peak: float | None) -> float | None:
    """Images/s of a device that does nothing but the model's arithmetic: three forward passes an image, in training."""
    peak = peak or peak_flops(plan.mesh.devices.flat[0].device_kind)
    rate = peak / (3 * plan.image_flops()) if peak else math.nan
    return rate if math.isfinite(rate) else None


def borrow(plan: Plan) -> Start:
    """The start that `train.init` names. Raises `UserError` for a run that is none, a step that it lacks, another network."""
    settings = plan.experiment.train
    word = settings.init or ""
    run, step = re.fullmatch(r"(.*?)(?:@(\d+))?", word, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    try:
        with contextlib.closing(Checkpointer(epath.Path(run).expanduser() / "checkpoints")) as saved:
            if not saved.any():
                raise UserError("no run with checkpoints is there; give RUN or RUN@STEP, RUN being its workdir")
            start = _restored(plan, saved, None if step is None else int(step))
            config = saved.config(start.step)
    except UserError as error:
        raise UserError(f"--train.init {word}: {error}") from error
    if start.step >= settings.steps:
        raise UserError(
            f"--train.init {word} is at step {start.step}: --train.steps must be more, not {settings.steps}"
        )
    free = ("train.init", *(name for name in MAY_CHANGE if name != "train.steps"))
    changes = "; ".join(line.strip() for line in differences(config, describe(plan.experiment), free))
    return start._replace(told=(f"from {run}, step {start.step}: {changes or 'nothing is changed'}", *start.told))


def _start(plan: Plan, saved: Checkpointer, borrowed: Start | None) -> Start:
    """Of the newest whole checkpoint, else what was borrowed, else fresh."""
    return _restored(plan, saved) if saved.any() else borrowed or Start(0, plan.init())


def _restored(plan: Plan, saved: Checkpointer, step: int | None = None) -> Start:
    """A checkpoint's state; it tells where other steps in all than those that were to be move the cooldown."""
    items, step = saved.restore(items_of(plan.shapes), step)
    settings, before = (
        plan.experiment.train,
        saved.config(step).get("train", {}).get("steps", plan.experiment.train.steps),
    )
    old, new = before - settings.cooldown, settings.steps - settings.cooldown
    told = f"train.steps was {before} and is {settings.steps}: the cooldown begins at step {max(new, 0)}, not {max(old, 0)}"
    told += ", and the learning rate, which fell already, rises again" if new > old and step > old else ""
    state = TrainState(**items["train"], ema=items["ema"])
    return Start(step, state, (told,) if settings.cooldown and old != new else ())


def items_of(state: TrainState) -> dict[str, object]:
    """What a checkpoint holds, the average apart from the rest so that it can be read alone."""
    return {"train": {"step": state.step, "model": state.model, "opt_state": state.opt_state}, "ema": state.ema}


def _group(rows: Iterator[Records], step: int, steps: int, fused: int) -> Iterator[Records | list[Records]]:
    """The batches of each dispatch: one, or a list of as many as steps are fused."""
    while step < steps:
        after = next_step(step, steps, fused)
        yield next(rows) if fused == 1 else list(itertools.islice(rows, after - step))
        step = after
