"""What the command line of an experiment asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from gddim.errors import UserError, from_extra, place, printable, require
from gddim.experiment.checkpoints import trained
from gddim.experiment.compiled import kept_programs
from gddim.experiment.config import Experiment
from gddim.experiment.options import REGISTRY, UNGROUPED, explain, options, said, tyro
from gddim.experiment.restoration import Restoration
from gddim.experiment.revival import as_trained
from gddim.experiment.sampling import TIMES
from gddim.experiment.shown import COMPLETION, NEEDED, completion, needed
from gddim.experiment.words import process_or_own
from gddim.experiment.workdir import describe, differences

RUN = ("train", "sample", "evaluate")  # what the verb run stands for
Verb = Literal["run", "train", "sample", "evaluate", "likelihood", "encode", "restore", "fit"]
EPILOGUE = """Exit status: 0 done; 1 failed, or the loss was not finite; 2 a wrong option, value or path,
nothing written; 75 stopped by SIGTERM or train.minutes, or while it trains by Ctrl-C, the state saved, so that the same command
continues; 130 stopped by either otherwise; 134 another process of the job was lost, continue likewise. VERB --help
tells what that verb needs, --help all there is; source <(python -m experiments.NAME --completion) has bash complete
verbs and options."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What to do with an experiment."""

    verb: Annotated[Verb, tyro.conf.Positional]
    """train: to the last step, continuing the run in the workdir; sample: write samples and pictures of them;
    evaluate: write the table of distances; run: these three; likelihood: tell the bits per dimension of held-out data;
    encode: held-out data to latents and back; restore: held-out images from what --task measures of them;
    fit: learn a table for sampling.nfe calls of a process."""
    workdir: str
    """Folder of the run, local or gs://…; made where there is none."""
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = dataclasses.field(metadata={UNGROUPED: True})
    restore: Restoration = dataclasses.field(default=Restoration())
    """What is measured of held-out images, and how they are restored."""
    from_: Annotated[tuple[str, ...], tyro.conf.arg(name="from")] = ()
    """Files of images, or .npy and .npz of records: sample draws from them, noised, encode takes them for the held-out ones,
    and shows what lies between them."""
    strength: float = 0.5
    """Of sample --from: the share of noise in the variance of what samples start with, 1 being noise alone."""
    step: int | None = None
    """Checkpoint that is sampled, evaluated, …; without it the newest whole one."""
    peak_flops: float | None = None
    """FLOP/s of one accelerator at full rate, for the share that training reaches; without it what is known of it."""
    compiled: str | None = dataclasses.field(default_factory=kept_programs)
    """Folder of compiled programs, in which the same command on the same machine finds them; it may be deleted. None: none."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the configuration and what it needs, and do nothing."""
    kept: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Settings that are the run's, and not what the experiment's file says."""
    everywhere: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Which of sampling.power and sampling.t_min the command line gave: an evaluation uses these for every process."""

    @property
    def nowhere(self) -> bool:
        """Whether this is a dry run without --workdir."""
        return self.dry_run and self.workdir == default_workdir(self.experiment)

    def __post_init__(self):
        require(0 < self.strength <= 1, f"strength must be in (0, 1], not {self.strength:g}")
        require(self.peak_flops is None or self.peak_flops > 0, f"peak_flops must be > 0, not {self.peak_flops}")


def default_workdir(experiment: Experiment) -> str:
    """Where a run goes that was given no folder."""
    return f"runs/{experiment.name}"


def parse(experiment: Experiment, argv: Sequence[str]) -> Command:
    """The command that the arguments ask for. Raises `UserError`, in one line, for a wrong name or value.

    What follows training takes all that the arguments do not say from the run, not from the experiment's file.
    """
    printable()
    command = _parse(experiment, argv)
    if command.verb in ("run", "train") or command.nowhere:
        return command
    found = trained(experiment, place(command.workdir))
    if found is None or found[1].get("name") != experiment.name:
        return command
    theirs = as_trained(experiment, found[1])
    lines = differences(describe(experiment), describe(theirs), {"train", "data", "net", "sde", "model"})
    return dataclasses.replace(_parse(theirs, argv), kept=tuple(line.split(":")[0].strip() for line in lines))


def _parse(experiment: Experiment, argv: Sequence[str]) -> Command:
    with from_extra("train"):
        import tyro
    if experiment.model.predicts != "eps" and "--model.predicts eps" in " ".join(argv).replace("=", " "):
        experiment = experiment.predicting_eps()
    for word in said(argv, "--process").values():
        with contextlib.suppress(UserError):  # which is told below
            sampling = experiment.sampling.through(process_or_own(word), experiment.sde)
            experiment = dataclasses.replace(experiment, sampling=sampling)
    default = Command("run", default_workdir(experiment), experiment)
    if COMPLETION in argv:
        print(completion(program().split()[-1], get_args(Verb), dict(options(default))), end="")
        sys.exit(0)
    about = f"{sys.modules['__main__'].__doc__ or experiment.name}\n\n{EPILOGUE}"
    settings = {"prog": program(), "description": about, "registry": REGISTRY}
    if {"-h", "--help"} & set(argv):
        verb = next((word for word in argv if word in NEEDED), "run")
        shown = needed(default, verb)
        tyro.cli(type(shown), args=["--help"], default=shown, **settings)
    settings["default"] = default
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            command, unknown = tyro.cli(Command, args=argv, return_unknown_args=True, **settings)
    except SystemExit as stop:
        explain(argv, dict(options(default)), get_args(Verb))
        raise UserError(_cause(stop) or f"{shlex.join(argv)} cannot be read; see --help") from None
    if unknown:
        explain(argv, dict(options(default)), get_args(Verb))
        raise UserError(f"{unknown[0]} is no option; see --help")
    if command.restore != Restoration() and command.verb != "restore":
        raise UserError(f"--task, --mask and --restore are of the verb restore, not of {command.verb}")
    if "--from" in argv and not command.from_:
        raise UserError("--from needs files")
    if command.from_ and command.verb not in ("sample", "encode"):
        raise UserError(f"--from is of the verbs sample and encode, not of {command.verb}")
    if command.strength != Command.strength and not (command.verb == "sample" and command.from_):
        raise UserError("--strength is of sample --from FILE")
    own = command.verb in ("evaluate", "likelihood") or (command.verb == "encode" and not command.from_)
    if own and (words := said(argv, "--classes", "--sampling.classes", "--per-class", "--sampling.per-class")):
        raise UserError(f"{min(words)} is of sample, restore, fit and encode --from, not of {command.verb}")
    if command.step is not None and command.verb in ("run", "train"):
        raise UserError("--step is for what follows training; training continues from the newest checkpoint")
    times = {f"--sampling.{name.replace('_', '-')}": name for name in TIMES}
    return dataclasses.replace(command, everywhere=tuple(times[word] for word in said(argv, *times)))


def _cause(stop: SystemExit) -> str:
    """What was raised while tyro built an object, where that ended it, and of which group of options it is."""
    error, message, group = stop.__context__, "", ""
    while error is not None:
        message, found = str(error), getattr(error, "arg", None)
        group = found if isinstance(found, str) else group
        error = error.__context__
    group = group.removeprefix("experiment").removeprefix(".")
    return f"{group}: {message}" if group else message


def program() -> str:
    """How this program is called."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"
