"""The checkpoints of a run: what they hold, and what training and sampling begin with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import NamedTuple

import jax
from etils import epath
from jaxtyping import PyTree

from gddim import compact, weights
from gddim.checkpoint import Checkpointer
from gddim.checksums import checksums
from gddim.errors import UserError
from gddim.experiment.config import Experiment
from gddim.experiment.plan import Plan
from gddim.experiment.snapshots import placed, rebuild, state_of
from gddim.experiment.workdir import CONFIG, check_release, describe, differences, may_change, read_config, saves
from gddim.train import TrainState


class Start(NamedTuple):
    """Where training begins: a step, the state there, and what a user should know of it."""

    step: int
    state: TrainState
    notes: tuple[str, ...] = ()


def checkpoints(experiment: Experiment, workdir: epath.Path) -> Checkpointer:
    """Those of the run in a workdir."""
    settings = experiment.train
    return Checkpointer(workdir / "checkpoints", keep_last=settings.keep, keep_every=settings.keep_every or None)


def items_of(state: TrainState) -> dict[str, object]:
    """What a checkpoint holds, the average apart from the rest so that it can be read alone."""
    rest = {"step": state.step, "model": state.model, "opt_state": state.opt_state, "averages": state.averages}
    return {"train": rest, "ema": state.ema}


def checkpoint_digest(params: PyTree) -> str:
    """Tells apart parameters that differ in any bit, whatever mesh they are on."""
    return hashlib.sha256(json.dumps(checksums(jax.tree.leaves(params))).encode()).hexdigest()[:16]


def restore_ema(
    plan: Plan, workdir: epath.Path, step: int | None = None, ema: float | None = None
) -> tuple[PyTree, int]:
    """The averaged parameters of a checkpoint, the newest whole one if no step is given, and its step.

    With a length `ema`, by default `sampling.ema`, those of that, rebuilt. Those of `weights` where the run has no checkpoint.
    """
    ema = plan.experiment.sampling.ema if ema is None else ema
    if shipped := _shipped(plan.experiment, workdir):
        return placed(plan.shapes.ema, shipped.arrays, str(plan.experiment.weights)), shipped.about["step"]
    if ema:
        return rebuild(plan.shapes.ema, workdir, ema, step)
    with contextlib.closing(checkpoints(plan.experiment, workdir)) as saved:
        items, step = saved.restore({"ema": plan.shapes.ema}, step)
    return items["ema"], step


def trained(experiment: Experiment, workdir: epath.Path) -> tuple[str, dict] | None:
    """What holds the trained network, as errors call it, and its configuration: the run in a workdir, or the experiment's
    `weights` where that has no checkpoint. None where neither is. Raises `UserError` for a folder or file of something else.
    """
    config = read_config(workdir)
    if config is not None and saves(workdir):
        return f"--workdir {workdir}", config
    shipped = _shipped(experiment, workdir)
    return shipped and (str(experiment.weights), shipped.config)


def _shipped(experiment: Experiment, workdir: epath.Path) -> weights.Weights | None:
    if experiment.weights is None or saves(workdir) or not epath.Path(experiment.weights).exists():
        return None
    return weights.read(epath.Path(experiment.weights))


def start(plan: Plan, saved: Checkpointer, borrowed: Start | None = None) -> Start:
    """Of the newest whole checkpoint, else what was borrowed, else fresh."""
    return _restored(plan, saved) if saved.any() else borrowed or Start(0, plan.init())


def borrow(plan: Plan) -> Start:
    """The start that `train.init` names. Raises `UserError` for a run that is none, a step that it lacks, another network."""
    settings = plan.experiment.train
    word = settings.init or ""
    run, step = re.fullmatch(r"(.*?)(?:@(\d+))?", word, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    folder = epath.Path(run).expanduser()
    try:
        if step is None and compact.holds_state(folder):
            start, config = _unpacked(plan, folder)
        else:
            start, config = _of_run(plan, folder, step)
    except UserError as error:
        raise UserError(f"--train.init {word}: {error}") from error
    if start.step > settings.steps:
        raise UserError(
            f"--train.init {word} is at step {start.step}: --train.steps must be no less, not {settings.steps}"
        )
    free = may_change(plan.experiment) - {"train.steps"} | {"train.init"}
    changes = "; ".join(line.strip() for line in differences(config, describe(plan.experiment), free))
    return start._replace(notes=(f"from {run}, step {start.step}: {changes or 'nothing is changed'}", *start.notes))


def _of_run(plan: Plan, run: epath.Path, step: str | None) -> tuple[Start, dict]:
    """The checkpoint of another run, and its configuration."""
    if (run / CONFIG).exists():
        check_release(str(run), read_config(run) or {})
    with contextlib.closing(Checkpointer(run / "checkpoints")) as saved:
        if not saved.any():
            raise UserError("no run with checkpoints is there; give RUN or RUN@STEP, RUN being its workdir")
        start = _restored(plan, saved, None if step is None else int(step))
        return start, saved.config(start.step)


def _restored(plan: Plan, saved: Checkpointer, step: int | None = None) -> Start:
    """A checkpoint's state, with a note where the cooldown has moved."""
    items, step = saved.restore(items_of(plan.shapes), step)
    state = TrainState(**items["train"], ema=items["ema"])
    return Start(step, state, _cooldown_moved(plan, saved.config(step), step))


def _unpacked(plan: Plan, folder: epath.Path) -> tuple[Start, dict]:
    """An exported state, and the configuration it was of; it notes what of it is not as it was."""
    state, config, moments = state_of(plan, folder)
    step = int(state.step)
    anew = [word for name, word in (("mu", "first"), ("nu", "second")) if name not in moments]
    note = "the state was rounded" + f", and Adam's {' and '.join(anew)} moments begin at 0" * bool(anew)
    return Start(step, state, (note, *_cooldown_moved(plan, config, step))), config


def _cooldown_moved(plan: Plan, config: dict, step: int) -> tuple[str, ...]:
    """A line where the run has other steps in all than those that were to be."""
    settings = plan.experiment.train
    before = config.get("train", {}).get("steps", settings.steps)
    old, new = max(before - settings.cooldown, 0), max(settings.steps - settings.cooldown, 0)
    if not settings.cooldown or before == settings.steps:
        return ()
    moves = f"begins at step {new}, not {old}" if new != old else f"ends at step {settings.steps}, not {before}"
    note = f"train.steps was {before} and is {settings.steps}: the cooldown {moves}"
    note += ", and the learning rate, which fell already, rises again" if settings.steps > before and step > old else ""
    return (note,)
