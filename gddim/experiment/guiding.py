"""What guides the samples of a run: checked, and the worse network read."""

from __future__ import annotations

from collections.abc import Collection

from etils import epath

from gddim.checkpoint import Checkpointer
from gddim.data import classes_of
from gddim.errors import UserError, require
from gddim.experiment.checkpoints import checkpoint_digest, restore_ema
from gddim.experiment.config import Experiment
from gddim.experiment.plan import Plan
from gddim.experiment.snapshots import check_snapshots
from gddim.guidance import UNTOLD, Guidance
from gddim.parallel import tell
from gddim.sde.base import positions
from gddim.sde.words import process_name


def check_denoiser(experiment: Experiment, what: str) -> None:
    """Raise `UserError` where the network is no denoiser `D(y; σ)`, which guidance and inverse problems are made of."""
    predicts, sde = experiment.model.predicts, experiment.sde
    require(
        predicts == "data" or (predicts == "eps" and sde.k == 1 and not positions(sde)),
        f"{what}: this network predicts the ε of {process_name(sde)} (model.predicts {predicts}) and is no denoiser of "
        "x₀ + σn; train one with --model.predicts data",
    )


def check_guide(experiment: Experiment, workdir: epath.Path, verbs: Collection[str]) -> None:
    """Raise `UserError` for guidance that cannot be; says what is lost by one that can, but had better not."""
    guide = experiment.sampling.guide
    guide.check()
    if not guide.acts:
        return
    for verb in ("likelihood", "encode", "fit"):
        require(verb not in verbs, f"guide.scale {guide.scale:g}: {verb} is of the network alone: give --guide.scale 1")
    check_denoiser(experiment, f"guide.scale {guide.scale:g}")
    if guide.by_worse:
        name = "checkpoint" if guide.checkpoint is not None else "ema"
        require(
            "train" not in verbs,
            f"--guide.{name} is for what follows training: give it to sample, evaluate and restore",
        )
        if guide.ema:
            check_snapshots(workdir, "--guide.ema")
        elif guide.checkpoint not in (saved := Checkpointer(workdir / "checkpoints").steps()):
            raise UserError(f"--guide.checkpoint {guide.checkpoint}: the run has checkpoints {saved}")
        return
    require(
        classes_of(experiment.data) > 0,
        f"guide.scale {guide.scale:g}: this run knows no classes; train one with --data.labels, or give --guide.checkpoint",
    )
    if not experiment.train.label_dropout:
        tell(f"warning: guide.scale {guide.scale:g}: {UNTOLD}")


def restore_guide(plan: Plan, workdir: epath.Path, step: int) -> tuple[Guidance, dict[str, str]]:
    """What guides the samples of the checkpoint of a step, and what tells it from others; nothing where nothing does."""
    guide = plan.experiment.sampling.guide
    if not guide.by_worse:
        return guide.away_from(), {"guide": str(guide)} if guide.acts else {}
    at = step if guide.checkpoint is None else guide.checkpoint
    try:
        params, _ = restore_ema(plan, workdir, at, guide.ema)
    except UserError as error:
        raise UserError(f"guide, {guide}: {error}") from error
    told = {"guide": str(guide), "worse": checkpoint_digest(params)}
    return guide.away_from(plan.model(params)), told
