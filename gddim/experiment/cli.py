"""The command line of every experiment."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NoReturn

import jax
import tyro
from etils import epath

from gddim.errors import UserError
from gddim.evaluation.cell import check_samplers
from gddim.evaluation.samplers import parse_sampler
from gddim.experiment.config import MAY_CHANGE, MAY_CHANGE_AFTER, Experiment, require
from gddim.experiment.encoding import encode, likelihood
from gddim.experiment.evaluating import evaluate
from gddim.experiment.measure import cells, feature_space, watched
from gddim.experiment.plan import Plan
from gddim.experiment.training import Preempted, borrow, run_training
from gddim.experiment.verbs import dry_run, sample
from gddim.experiment.workdir import check_config, check_shared, check_space, describe, locked, write_config
from gddim.parallel import EXIT_PREEMPTED, await_verdict, ending_on_sigterm, initialize, leave, on_main
from gddim.sde import AbstractLinearSDE
from gddim.train import Diverged

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EPILOGUE = """Exit status: 0 done; 1 failed, or the loss was not finite; 2 a wrong option, value or path,
nothing written; 75 stopped by SIGTERM or Ctrl-C, the state saved, so that the same command continues; 134 another
process of the job was lost, continue likewise."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What to do with an experiment."""

    verb: Annotated[Literal["run", "train", "sample", "evaluate", "likelihood", "encode"], tyro.conf.Positional]
    """train: to the last step, continuing the run in the workdir; sample: write samples and pictures of them;
    evaluate: write the table of distances; run: these three; likelihood: tell the bits per dimension of held-out data;
    encode: held-out data to latents and back."""
    workdir: str
    """Folder of the run, local or gs://…; made where there is none."""
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    step: int | None = None
    """Checkpoint that is sampled, evaluated, …; without it the newest whole one."""
    peak_flops: float | None = None
    """FLOP/s of one accelerator at full rate, for the share that training reaches; without it what is known of it."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the configuration and what it needs, and do nothing."""

    def __post_init__(self):
        require(self.peak_flops is None or self.peak_flops > 0, f"peak_flops must be > 0, not {self.peak_flops}")


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line of an experiment file; ends the process with a status that says how it went."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs, at length, what it raises as well
    try:
        carry_out(parse(experiment, argv))
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
    """The command that the arguments ask for. Raises `UserError`, in one line, for a wrong name or value."""
    default = Command("run", f"runs/{experiment.name}", experiment)
    about = f"{sys.modules['__main__'].__doc__ or experiment.name}\n\n{EPILOGUE}"

    def ask(*words: str) -> Command:
        return tyro.cli(Command, args=words, default=default, prog=_program(), description=about, registry=_FIXED)

    if {"-h", "--help"} & set(argv):
        ask("--help")
    try:
        with _captured() as said:
            command = ask(*argv)
    except SystemExit:
        with _captured() as known, contextlib.suppress(SystemExit):
            ask("--help")
        _refuse_samplers(argv)
        _refuse_unknown(argv, re.findall(r"(?<=│ |, )--[\w.-]+", known.getvalue().decode()))
        raise UserError(_one_line(said.getvalue().decode())) from None
    if command.step is not None and command.verb in ("run", "train"):
        raise UserError("--step is for what follows training; training continues from the newest checkpoint")
    return command


def carry_out(command: Command) -> None:
    """Do what a command says. Whatever can be wrong with it raises `UserError` before anything is written."""
    experiment, workdir = command.experiment, epath.Path(command.workdir).expanduser()
    initialize()
    training = command.verb in ("run", "train")
    config, free = describe(experiment), MAY_CHANGE if training else MAY_CHANGE + MAY_CHANGE_AFTER
    with contextlib.ExitStack() as stack:
        if not jax.distributed.is_initialized():  # JAX has its own handler, which training relies on
            stack.enter_context(ending_on_sigterm())
        known = on_main(lambda: check_config(workdir, config, free))
        plan = Plan(experiment)
        if command.dry_run:
            dry_run(plan)
            return
        if not training and not known:
            raise UserError(f"--workdir {workdir} holds no run: train it first")
        if command.verb in ("run", "sample") or experiment.train.show_every:
            check_samplers([watched(experiment)], experiment.sde)
        measured = command.verb in ("run", "evaluate") or experiment.eval.every > 0
        if measured:
            cells(experiment)
        if training:
            source, batch = experiment.data.train(), experiment.train.batch
            require(
                batch <= len(source), f"--train.batch {batch:,} is more than the {len(source):,} records of the data"
            )
        if measured:
            feature_space(experiment.eval)

        def claim() -> bool:
            stack.enter_context(locked(workdir, training))
            check_config(workdir, config, free)
            if training:
                settings = experiment.train
                saves = min(settings.keep, -(-settings.steps // settings.save_every))
                check_space(workdir, saves + 1, plan.state_bytes)
                write_config(workdir, config)
            return True

        def claim_checkpoints() -> bool:
            stack.enter_context(locked(workdir, training=False, wait=True))
            return True

        borrowed = borrow(plan) if training and experiment.train.init and not known else None
        on_main(claim)
        check_shared(workdir)
        if training:
            run_training(plan, source, workdir, command.peak_flops, borrowed)
        if command.verb == "run":
            on_main(claim_checkpoints)
        if jax.distributed.is_initialized():
            stack.enter_context(ending_on_sigterm())
        if command.verb in ("run", "sample"):
            sample(plan, workdir, command.step)
        if command.verb in ("run", "evaluate"):
            evaluate(plan, workdir, command.step)
        if command.verb == "likelihood":
            likelihood(plan, workdir, command.step)
        if command.verb == "encode":
            encode(plan, workdir, command.step)


_FIXED = tyro.constructors.ConstructorRegistry()


@_FIXED.struct_rule
def _leave_alone(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """A process made of functions has no options: what is not built from its fields stays as the experiment has it."""
    if not dataclasses.is_dataclass(info.type) or not isinstance(info.default, AbstractLinearSDE):
        return None
    if {f.name for f in dataclasses.fields(info.type)} >= set(inspect.signature(info.type).parameters):
        return None
    return tyro.constructors.StructConstructorSpec(lambda: info.default, fields=())


def _end(status: int, message: str, perhaps_lost: bool = False) -> NoReturn:
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only tear the clean-up
    if jax.process_index() == 0 or status != EXIT_PREEMPTED:
        print(message, file=sys.stderr, flush=True)
    if status == EXIT_INTERRUPTED:
        os._exit(status)  # the threads of a save in flight would fill the screen with their tracebacks
    if perhaps_lost:
        await_verdict()
    leave(status)


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"


@contextlib.contextmanager
def _captured() -> Iterator[io.BytesIO]:
    """What is printed inside, in UTF-8, as on a terminal so wide that no line is broken."""
    said, columns = io.BytesIO(), os.environ.get("COLUMNS")
    text = io.TextIOWrapper(said, "utf-8", write_through=True)
    os.environ["COLUMNS"] = "10000"
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            yield said
    finally:
        text.detach()
        del os.environ["COLUMNS"]
        os.environ.update({} if columns is None else {"COLUMNS": columns})


def _one_line(box: str) -> str:
    """What tyro says in a framed box: its first paragraph, and the kind of value that it describes after it."""
    rows = [row.strip("│ ") for row in box.splitlines() if row.startswith("│")]
    end = next((i for i, row in enumerate(rows) if row.startswith("──")), len(rows))
    words = re.sub(r"^Error parsing (experiment\.)?", "", " ".join(rows[:end]))
    kind = [after for row, after in itertools.pairwise(rows) if row == "Argument helptext:"]
    return f"{words} (accepted: {kind[0]})" if kind and "accepted" not in words else words


def _refuse_samplers(argv: Sequence[str]) -> None:
    """Raise `UserError` for a sampler that is none; of a list of them tyro says only that it does not parse."""
    if "--eval.samplers" in argv:
        first = argv.index("--eval.samplers") + 1
        for word in itertools.takewhile(lambda word: not word.startswith("--"), argv[first:]):
            parse_sampler(word)


def _refuse_unknown(argv: Sequence[str], options: list[str]) -> None:
    """Raise `UserError` for an argument that no option takes: it tells the nearest, and the others of its group."""
    for name in (word.split("=")[0].replace("_", "-") for word in argv):
        if name.startswith("--") and name not in options:
            near = difflib.get_close_matches(name, options, n=3)
            group = [option for option in options if option.rpartition(".")[0] == name.rpartition(".")[0]]
            raise UserError(f"unknown option {name}; accepted: {', '.join(dict.fromkeys(near + group))}; see --help")
