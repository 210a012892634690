"""The command line of every experiment."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Literal, NoReturn, get_args

import jax

from gddim.data import check_labels, classes_of
from gddim.errors import MissingWeights, UserError, from_extra, place, printable
from gddim.evaluation.classes import Labelled
from gddim.experiment.checkpoints import borrow, trained
from gddim.experiment.compiled import keep_programs, kept_programs
from gddim.experiment.config import Experiment, require
from gddim.experiment.drawing import NoisedData
from gddim.experiment.fitting import fitted_by
from gddim.experiment.given import given_data
from gddim.experiment.guiding import check_guide
from gddim.experiment.measure import cells, check_measurable
from gddim.experiment.options import REGISTRY, UNGROUPED, explain, options, said, tyro
from gddim.experiment.outputs import check_names
from gddim.experiment.plan import Plan
from gddim.experiment.restoration import Restoration, check_restoration
from gddim.experiment.revival import as_trained, objects
from gddim.experiment.sampling import TIMES
from gddim.experiment.shown import COMPLETION, NEEDED, completion, needed
from gddim.experiment.snapshots import check_rebuildable
from gddim.experiment.verbs.dry_run import dry_run
from gddim.experiment.verbs.encode import encode
from gddim.experiment.verbs.evaluate import evaluate
from gddim.experiment.verbs.fit import fit_table
from gddim.experiment.verbs.likelihood import likelihood
from gddim.experiment.verbs.restore import restore
from gddim.experiment.verbs.sample import SAMPLES, sample
from gddim.experiment.verbs.train import Preempted, run_training
from gddim.experiment.words import process_or_own
from gddim.experiment.workdir import (
    OBJECTS,
    RECORDS,
    check_config,
    check_records,
    check_same,
    check_shared,
    check_space,
    describe,
    differences,
    may_change,
    read_config,
    remembering,
    reserved,
    write_config,
)
from gddim.parallel import EXIT_PREEMPTED, await_verdict, ending_on_sigterm, initialize, leave, on_main, tell
from gddim.samplers.method import check_methods
from gddim.train import Diverged

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
RUN = ("train", "sample", "evaluate")  # what the verb run stands for
AFTERWARDS = {
    "sample": sample, "evaluate": evaluate, "likelihood": likelihood, "encode": encode, "restore": restore, "fit": fit_table,
}  # fmt: skip
Verb = Literal["run", "train", "sample", "evaluate", "likelihood", "encode", "restore", "fit"]
EPILOGUE = """Exit status: 0 done; 1 failed, or the loss was not finite; 2 a wrong option, value or path,
nothing written; 75 stopped by SIGTERM or train.minutes, or while it trains by Ctrl-C, the state saved, so that the same command
continues; 130 stopped by Ctrl-C otherwise; 134 another process of the job was lost, continue likewise. VERB --help
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

    def __post_init__(self):
        require(0 < self.strength <= 1, f"strength must be in (0, 1], not {self.strength:g}")
        require(self.peak_flops is None or self.peak_flops > 0, f"peak_flops must be > 0, not {self.peak_flops}")


def default_workdir(experiment: Experiment) -> str:
    """Where a run goes that was given no folder."""
    return f"runs/{experiment.name}"


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line of an experiment file; ends the process with a status that says how it went."""
    argv = sys.argv[1:] if argv is None else list(argv)
    printable()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs, at length, what it raises as well
    try:
        execute(parse(experiment, argv))
    except UserError as error:
        _end(EXIT_USAGE, f"error: {error}")
    except Preempted as error:
        _end(EXIT_PREEMPTED, f"{error}; to continue: {shlex.join([*_program().split(), *argv])}")
    except Diverged as error:
        _end(EXIT_FAILED, f"error: not finite at {error}; the checkpoints before it are untouched")
    except OSError as error:
        _end(EXIT_FAILED, f"error: {error}", perhaps_lost=True)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = str(error).splitlines()[0][:200]
        _end(EXIT_FAILED, f"error: out of memory: {what}; make a batch smaller, raise train.accumulate or mesh.fsdp")
    except KeyboardInterrupt:
        _end(EXIT_INTERRUPTED, "interrupted; the same command continues from the last checkpoint")
    sys.exit(0)


def parse(experiment: Experiment, argv: Sequence[str]) -> Command:
    """The command that the arguments ask for. Raises `UserError`, in one line, for a wrong name or value.

    What follows training takes all that the arguments do not say from the run, not from the experiment's file.
    """
    command = _parse(experiment, argv)
    if command.verb not in AFTERWARDS or _nowhere(command):
        return command
    found = trained(experiment, place(command.workdir))
    if found is None or found[1].get("name") != experiment.name:
        return command
    theirs = as_trained(experiment, found[1])
    lines = differences(describe(experiment), describe(theirs), {"train", "data", "net", "sde", "model"})
    return dataclasses.replace(_parse(theirs, argv), kept=tuple(line.split(":")[0].strip() for line in lines))


def _nowhere(command: Command) -> bool:
    """Whether this is a dry run without --workdir."""
    return command.dry_run and command.workdir == default_workdir(command.experiment)


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
        print(completion(_program().split()[-1], get_args(Verb), dict(options(default))), end="")
        sys.exit(0)
    about = f"{sys.modules['__main__'].__doc__ or experiment.name}\n\n{EPILOGUE}"
    settings = {"prog": _program(), "description": about, "registry": REGISTRY}
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


def execute(command: Command) -> None:
    """Do what a command says. Whatever can be wrong with it raises `UserError` before anything is written."""
    experiment, workdir = command.experiment, place(command.workdir)
    initialize(experiment.train.batch // experiment.train.accumulate)
    verbs = RUN if command.verb == "run" else (command.verb,)
    training = "train" in verbs
    config, free = describe(experiment), may_change(experiment, after=not training)
    with contextlib.ExitStack() as stack:
        if not jax.distributed.is_initialized():  # JAX has its own handler, which training relies on
            stack.enter_context(ending_on_sigterm())
        found = None if training or _nowhere(command) else trained(experiment, workdir)

        def check() -> bool:
            if found:
                check_same(*found, config, free)
            return bool(found) or (training and not _nowhere(command) and check_config(workdir, config, free))

        known = on_main(check)
        if known:
            experiment = remembering(experiment, *(found or (f"--workdir {workdir}", read_config(workdir))))
        shown = training and experiment.train.show_every > 0
        measured = "evaluate" in verbs or (training and experiment.eval.every > 0)
        drawn = experiment.through(experiment.sampling.process) if shown or set(verbs) & AFTERWARDS.keys() else None
        if measured:
            experiment.evaluated()  # what cannot be is said also by a dry run
        plan = Plan(experiment)
        if command.dry_run:
            dry_run(plan)
            return

        # What could fail later is looked at now.
        if training:
            plan.check_batch()
            with from_extra("train"):
                import grain  # noqa: F401
                import orbax.checkpoint  # noqa: F401
                import tensorboardX  # noqa: F401
        if not training and not known:
            raise UserError(f"--workdir {workdir} holds no run: train it first")
        shipped = found if found and found[0] == experiment.weights else None
        if shipped and command.step is not None:
            raise UserError(f"--step {command.step}: {experiment.weights} holds one set of parameters")
        if "restore" in verbs:
            check_restoration(experiment, command.restore)
        experiment.drawn_classes(experiment.sampling)
        classified = "evaluate" in verbs and isinstance(experiment.data, Labelled)
        if drawn is not None and ({"sample", "restore"} & {*verbs} or shown or classified):
            check_methods([experiment.sampling.method(drawn, experiment.data.shape)], drawn)
        if shown or measured or set(verbs) & AFTERWARDS.keys():
            check_guide(experiment, workdir, verbs)
        table = cells(experiment, command.everywhere) if measured else []
        given = given_data(command.from_, tuple(experiment.data.shape)) if command.from_ else None
        noised = given if "sample" in verbs else None
        start = None if noised is None else NoisedData.of(experiment, noised, command.strength)
        problem = fitted_by(experiment, workdir) if "fit" in verbs else None
        source = experiment.data.train() if training else None
        if source is not None:
            check_labels(experiment.data, source, "the data")
        if source is not None and (batch := experiment.train.batch) > len(source):
            raise UserError(f"--train.batch {batch:,} is more than the {len(source):,} records of the data")
        if measured:
            try:
                check_measurable(experiment, workdir, source)
            except MissingWeights as error:
                if command.verb != "run" or experiment.eval.every:
                    raise
                verbs = RUN[:-1]
                tell(f"without a table at the end: {error}")
                stack.callback(tell, "without a table: the verb evaluate makes one later")
        check_rebuildable(experiment, workdir, training)
        if "sample" in verbs:
            check_names(workdir, *SAMPLES)
        if source is not None:
            records = check_records(workdir, config, source, classes_of(experiment.data))
            config |= {RECORDS: records, OBJECTS: objects(experiment)}
        borrowed = borrow(plan) if training and experiment.train.init and not known else None

        def reserve() -> None:
            if shipped and read_config(workdir) is None:
                # so that the folder is that of a run, which may still be trained
                write_config(workdir, shipped[1] | {"weights": experiment.weights})
            stack.enter_context(reserved(workdir, training))
            check_config(workdir, config, free)
            if training:
                settings = experiment.train
                saves = min(settings.keep, -(-settings.steps // settings.save_every))
                check_space(workdir, saves + 1, plan.state_bytes)
                write_config(workdir, config)

        on_main(reserve)
        check_shared(workdir)
        if command.compiled is not None:
            keep_programs(command.compiled)
        if command.kept:
            tell(f"as the run has it, not the experiment's file: {', '.join(command.kept)}")
        if shipped:
            tell(f"--workdir {workdir} holds no checkpoint: {experiment.weights} is used")
        if source is not None:
            run_training(plan, source, workdir, command.peak_flops, borrowed)
        if command.verb == "run":
            on_main(lambda: stack.enter_context(reserved(workdir, training=False, wait=True)))
        if jax.distributed.is_initialized():
            stack.enter_context(ending_on_sigterm())
        told = {
            "sample": {"start": start}, "encode": {"given": given}, "restore": {"settings": command.restore},
            "fit": {"problem": problem}, "evaluate": {"cells": table},
        }  # fmt: skip
        for verb in verbs:
            if verb in AFTERWARDS:
                AFTERWARDS[verb](plan, workdir, step=command.step, **told.get(verb, {}))


def _end(status: int, message: str, perhaps_lost: bool = False) -> NoReturn:
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only tear the clean-up
    if status != EXIT_PREEMPTED or jax.process_index() == 0:  # without a backend there is no index
        print(message, file=sys.stderr, flush=True)
    if status == EXIT_INTERRUPTED:
        os._exit(status)  # the threads of a save in flight would fill the screen with their tracebacks
    if perhaps_lost:
        await_verdict()
    leave(status)


def _cause(stop: SystemExit) -> str:
    """What was raised while tyro built an object, where that ended it, and of which group of options it is."""
    error, message, group = stop.__context__, "", ""
    while error is not None:
        message, found = str(error), getattr(error, "arg", None)
        group = found if isinstance(found, str) else group
        error = error.__context__
    group = group.removeprefix("experiment").removeprefix(".")
    return f"{group}: {message}" if group else message


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"
