"""The command line of every experiment."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
from etils import epath

from gddim.data import Source, check_labels, classes_of
from gddim.errors import MissingWeights, UserError, from_extra, out_of_memory, place
from gddim.evaluation.classes import Labelled
from gddim.experiment.checkpoints import Start, borrow, trained
from gddim.experiment.command import RUN, Command, parse, program
from gddim.experiment.compiled import keep_programs
from gddim.experiment.config import Experiment
from gddim.experiment.drawing import NoisedData
from gddim.experiment.fitting import fitted_by
from gddim.experiment.given import given_data
from gddim.experiment.guiding import check_guide
from gddim.experiment.measure import cells, check_measurable
from gddim.experiment.outputs import check_names
from gddim.experiment.plan import Plan
from gddim.experiment.restoration import check_restoration
from gddim.experiment.revival import objects
from gddim.experiment.snapshots import check_rebuildable
from gddim.experiment.verbs.dry_run import dry_run
from gddim.experiment.verbs.encode import encode
from gddim.experiment.verbs.evaluate import evaluate
from gddim.experiment.verbs.fit import fit_table
from gddim.experiment.verbs.likelihood import likelihood
from gddim.experiment.verbs.restore import restore
from gddim.experiment.verbs.sample import FLOW, SAMPLES, sample
from gddim.experiment.verbs.train import Preempted, run_training
from gddim.experiment.workdir import (
    OBJECTS,
    RECORDS,
    check_config,
    check_records,
    check_same,
    check_shared,
    check_space,
    describe,
    may_change,
    read_config,
    remembering,
    reserved,
    write_config,
)
from gddim.parallel import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    await_verdict,
    ending_on_sigterm,
    initialize,
    leave,
    on_main,
    tell,
)
from gddim.samplers.method import check_methods
from gddim.sde import AbstractLinearSDE
from gddim.train import Diverged

EXIT_FAILED, EXIT_USAGE = 1, 2
AFTERWARDS = {
    "sample": sample, "evaluate": evaluate, "likelihood": likelihood, "encode": encode, "restore": restore, "fit": fit_table,
}  # fmt: skip


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line of an experiment file; ends the process with a status that says how it went."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs, at length, what it raises as well
    try:
        execute(parse(experiment, argv))
    except UserError as error:
        _end(EXIT_USAGE, f"error: {error}")
    except Preempted as error:
        _end(EXIT_PREEMPTED, f"{error}; to continue: {shlex.join([*program().split(), *argv])}")
    except Diverged as error:
        _end(EXIT_FAILED, f"error: not finite at {error}; the checkpoints before it are untouched")
    except OSError as error:
        _end(EXIT_FAILED, f"error: {error}", perhaps_lost=True)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not out_of_memory(error):
            raise
        what = str(error).splitlines()[0][:200]
        _end(EXIT_FAILED, f"error: out of memory: {what}; make a batch smaller, raise train.accumulate or mesh.fsdp")
    except KeyboardInterrupt:
        _end(EXIT_INTERRUPTED, "interrupted; the same command continues from the last checkpoint")
    sys.exit(0)


def execute(command: Command) -> None:
    """Do what a command says. Whatever can be wrong with it raises `UserError` before anything is written."""
    initialize(command.experiment.train.batch // command.experiment.train.accumulate)
    asked = Asked.of(command)
    workdir, free = place(command.workdir), may_change(command.experiment, after=not asked.training)
    kept = asked.training or command.verb == "evaluate"
    with contextlib.ExitStack() as stack:
        if not jax.distributed.is_initialized():  # JAX has its own handler, which training relies on
            stack.enter_context(ending_on_sigterm(kept))
        config = describe(command.experiment)
        found, known = _run_of(command, asked, workdir, config, free)
        records = {}
        if known:
            told = found or (f"--workdir {workdir}", read_config(workdir))
            records = (told[1] or {}).get(RECORDS) or {}
            command = dataclasses.replace(command, experiment=remembering(command.experiment, *told))
        experiment = command.experiment
        drawn = experiment.through(experiment.sampling.process) if asked.drawn else None
        if asked.measured:
            experiment.evaluated()  # what cannot be is said also by a dry run
        plan = Plan(experiment, dtype=records.get("dtype"))
        if command.dry_run:
            dry_run(plan)
            return
        shipped = found if found and found[0] == experiment.weights else None
        if not (asked.training or known):
            raise UserError(f"--workdir {workdir} holds no run: train it first")
        if shipped and command.step is not None:
            raise UserError(f"--step {command.step}: {experiment.weights} holds one set of parameters")
        checked = _checked(command, asked, plan, workdir, drawn, config, known)

        def reserve() -> None:
            if shipped and read_config(workdir) is None:
                # so that the folder is that of a run, which may still be trained
                write_config(workdir, shipped[1] | {"weights": experiment.weights})
            stack.enter_context(reserved(workdir, asked.training))
            check_config(workdir, checked.config, free)
            if asked.training:
                settings = experiment.train
                saves = min(settings.keep, -(-settings.steps // settings.save_every))
                check_space(workdir, saves + 1, plan.state_bytes)
                write_config(workdir, checked.config)

        on_main(reserve)
        check_shared(workdir, checked.config.get(RECORDS))
        if command.compiled is not None:
            keep_programs(command.compiled)
        if command.kept:
            tell(f"as the run has it, not the experiment's file: {', '.join(command.kept)}")
        if shipped:
            tell(f"--workdir {workdir} holds no checkpoint: {experiment.weights} is used")
        if checked.untabled:
            tell(f"without a table at the end: {checked.untabled}")
            stack.callback(tell, "without a table: the verb evaluate makes one later")
        if checked.source is not None:
            plan.dtype = checked.source.dtype
            run_training(plan, checked.source, workdir, command.peak_flops, checked.borrowed)
        if command.verb == "run":
            on_main(lambda: stack.enter_context(reserved(workdir, training=False, wait=True)))
        if jax.distributed.is_initialized():
            stack.enter_context(ending_on_sigterm(kept))
        for verb in asked.verbs:
            if verb in AFTERWARDS and not (verb == "evaluate" and checked.untabled):
                AFTERWARDS[verb](plan, workdir, step=command.step, **checked.arguments.get(verb, {}))


class Asked(NamedTuple):
    """What a command makes, whatever else it is told."""

    verbs: tuple[str, ...]
    training: bool
    shown: bool
    """Samples while it trains."""
    measured: bool
    """A table, afterwards or while it trains."""

    @staticmethod
    def of(command: Command) -> Asked:
        verbs = RUN if command.verb == "run" else (command.verb,)
        training, experiment = "train" in verbs, command.experiment
        measured = "evaluate" in verbs or (training and experiment.eval.every > 0)
        return Asked(verbs, training, training and experiment.train.show_every > 0, measured)

    @property
    def drawn(self) -> bool:
        """Samples, at any time."""
        return self.shown or any(verb in AFTERWARDS for verb in self.verbs)


class Checked(NamedTuple):
    """What a command needs that was looked at before it begins."""

    config: dict[str, Any]
    source: Source | None
    """The records to train on."""
    borrowed: Start | None
    arguments: dict[str, dict[str, Any]]
    """Of each verb."""
    untabled: str
    """Why training and samples are to be had, and no table."""


def _run_of(
    command: Command, asked: Asked, workdir: epath.Path, config: dict, free: set[str]
) -> tuple[tuple[str, dict] | None, bool]:
    """What holds the network that was trained, and whether there is a run of this configuration; the same on every process."""
    found = None if asked.training or command.nowhere else trained(command.experiment, workdir)

    def check() -> bool:
        if found:
            check_same(*found, config, free)
        return bool(found) or (asked.training and not command.nowhere and check_config(workdir, config, free))

    return found, on_main(check)


def _checked(
    command: Command,
    asked: Asked,
    plan: Plan,
    workdir: epath.Path,
    drawn: AbstractLinearSDE | None,
    config: dict,
    known: bool,
) -> Checked:
    """Look now at what could fail later. Raises `UserError`."""
    experiment, verbs = command.experiment, asked.verbs
    if asked.training:
        plan.check_batch()
        with from_extra("train"):
            import grain  # noqa: F401
            import orbax.checkpoint  # noqa: F401
            import tensorboardX  # noqa: F401
    if "restore" in verbs:
        check_restoration(experiment, command.restore)
    experiment.drawn_classes(experiment.sampling)
    classified = "evaluate" in verbs and isinstance(experiment.data, Labelled)
    if drawn is not None and ({"sample", "restore"} & {*verbs} or asked.shown or classified):
        check_methods([experiment.sampling.method(drawn, experiment.data.shape)], drawn)
    if drawn is not None and "sample" in verbs and not command.from_:
        experiment.sampling.flow_grid(drawn, experiment.data.shape, FLOW)
    if asked.drawn or asked.measured:
        check_guide(experiment, workdir, verbs)
    arguments: dict[str, dict[str, Any]] = {"restore": {"settings": command.restore}}
    if asked.measured:
        arguments["evaluate"] = {"cells": cells(experiment, command.everywhere)}
    if command.from_:
        given = given_data(command.from_, tuple(experiment.data.shape))
        arguments["encode"] = {"given": given}
        if "sample" in verbs:
            arguments["sample"] = {"start": NoisedData.of(experiment, given, command.strength)}
    if "fit" in verbs:
        arguments["fit"] = {"problem": fitted_by(experiment, workdir)}
    source = experiment.data.train() if asked.training else None
    if source is not None:
        check_labels(experiment.data, source, "the data")
        if (batch := experiment.train.batch) > len(source):
            raise UserError(f"--train.batch {batch:,} is more than the {len(source):,} records of the data")
    untabled = ""
    if asked.measured:
        try:
            check_measurable(experiment, workdir, source)
        except MissingWeights as error:
            if command.verb != "run" or experiment.eval.every:
                raise
            untabled = str(error)
    check_rebuildable(experiment, workdir, asked.training, asked.measured and not untabled)
    if "sample" in verbs:
        check_names(workdir, *SAMPLES)
    if source is not None:
        records = check_records(workdir, config, source, classes_of(experiment.data))
        config = config | {RECORDS: records, OBJECTS: objects(experiment)}
    borrowed = borrow(plan) if asked.training and experiment.train.init and not known else None
    return Checked(config, source, borrowed, arguments, untabled)


def _end(status: int, message: str, perhaps_lost: bool = False) -> NoReturn:
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only tear the clean-up
    if status != EXIT_PREEMPTED or jax.process_index() == 0:  # without a backend there is no index
        print(message, file=sys.stderr, flush=True)
    if status == EXIT_INTERRUPTED:
        os._exit(status)  # the threads of a save in flight would fill the screen with their tracebacks
    if perhaps_lost:
        await_verdict()
    leave(status)
