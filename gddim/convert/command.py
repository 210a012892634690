"""`python -m gddim.convert SOURCE WORKDIR`: a published checkpoint as a run.

SOURCE is recognised by what is in it:
  a network snapshot of EDM (.pkl), SongUNet or DhariwalUNet
  a training state of score_sde_pytorch (.pth): VP, sub-VP or VE, DDPM++ or NCSN++
  a training state of CLD-SGM (.pth)
  a folder of diffusers' UNet2DModel, as of DDPM on CIFAR-10
  a training state of gDDIM, in flax's msgpack format: with --experiment NAME, as in python -m experiments.NAME
Nothing in it is imported or run. What a file does not tell is taken for what was published with such files; options of an
experiment may say it, as --sde.beta-max 10, --net.fir, --net.no-rescale where skip_rescale was False, or --net.width 64 where
a state of gDDIM differs from its experiment. A run of such a state is one that python -m experiments.NAME samples, evaluates
and trains on, with fresh moments of Adam. A network of one field (EDM's, score_sde's, diffusers') samples through every
process; those of CLD through CLD, by gddim:3:data. What draws the others is the default of python -m gddim.generate; EDM's
own is its --sampler heun.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import shlex
from typing import Any, Literal, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from etils import epath

from gddim.convert.flax import WEIGHTS, assign, read_state
from gddim.convert.published import Published
from gddim.convert.recognition import is_flax, read
from gddim.convert.score_sde import Process
from gddim.data import classes_of
from gddim.errors import UserError, exit_status, place, printable
from gddim.experiment import Experiment, cli
from gddim.experiment.checkpoints import checkpoints, items_of
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import RECORDS, describe, read_config, reserved, write_config
from gddim.parallel import check_backend
from gddim.storage import all_or_none
from gddim.train import TrainState


def convert(
    source: epath.PathLike, workdir: epath.PathLike, experiment: Experiment, weights: Literal["ema", "raw"] = "ema"
) -> int:
    """Write a training state of gDDIM as a run of `experiment` into a new or empty folder; returns its step.

    The averaged parameters are those of `weights`, the others the raw ones where there are any. Raises `UserError`,
    with nothing written, for a source or a folder that will not do.
    """
    if experiment.model.predicts != "eps":
        raise UserError(f"published networks predict ε: {experiment.name} needs --model.predicts eps")
    _check_empty(workdir)
    plan = Plan(experiment)
    state = read_state(source)
    shapes = eqx.combine(plan.shapes.model, plan.static)
    ema = assign(state, shapes, weights, source)
    raw = assign(state, shapes, "raw", source) if "optimizer" in state else ema
    step = np.asarray(state.get("step", 0))
    if step.shape or not np.issubdtype(step.dtype, np.integer) or not 0 <= step < 2**31:
        raise UserError(
            f"{source}: its step is {state['step']!r:.60}; accepted is a whole number of at least 0, below 2³¹"
        )
    _write(workdir, plan, raw, ema, int(step), describe(experiment))
    return int(step)


def convert_published(published: Published, workdir: epath.PathLike) -> None:
    """Write a checkpoint that has been read as a run of its own experiment, into a new or empty folder.

    Raises `UserError`, with nothing written, for a folder that will not do.
    """
    _check_empty(workdir)
    experiment, model = published.experiment, published.model
    classes = classes_of(experiment.data)
    records = {"shape": list(experiment.data.shape)} | ({"classes": classes} if classes else {})
    config = describe(experiment) | {RECORDS: records}
    _write(workdir, Plan(experiment), model, model, published.step, config)


def _check_empty(workdir: epath.PathLike) -> None:
    if read_config(place(workdir)) is not None:
        raise UserError(f"{workdir} holds a run already and is not overwritten: give a new or an empty folder")


def _write(workdir: epath.PathLike, plan: Plan, raw: Any, ema: Any, step: int, config: dict[str, Any]) -> None:
    workdir = place(workdir)
    fresh = TrainState.create(raw, plan.optimizer, len(plan.shapes.averages))
    made = dataclasses.replace(fresh, step=jnp.asarray(step, jnp.int32), ema=eqx.filter(ema, eqx.is_inexact_array))
    with reserved(workdir), all_or_none(workdir / "checkpoints"):  # so that the same command may be tried again
        with contextlib.closing(checkpoints(plan.experiment, workdir)) as saved:
            saved.save(step, items_of(made), config)
        write_config(workdir, config)  # last: without it the folder is no run


def load_experiment(name: str) -> Experiment:
    """The `EXPERIMENT` of `experiments.NAME`, or of the module of that name where it has a dot."""
    try:
        return importlib.import_module(_module(name)).EXPERIMENT
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two of names as .x and nothing
        raise UserError(f"--experiment {name}: {error}; give the name of a module with an EXPERIMENT") from None


def _module(name: str) -> str:
    return name if "." in name else f"experiments.{name}"


def main(arguments: list[str] | None = None) -> int:
    printable()
    parser = argparse.ArgumentParser(
        "python -m gddim.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="Options of an experiment: see python -m experiments.NAME --help",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint; a state of gDDIM may be in a bucket, gs://…")
    parser.add_argument("workdir", metavar="WORKDIR", help="a new or an empty folder for the run")
    parser.add_argument("--experiment", metavar="NAME", help="of a state of gDDIM: as in python -m experiments.NAME")
    parser.add_argument("--weights", choices=tuple(WEIGHTS), default="ema", help="averaged (default) or raw parameters")
    parser.add_argument(
        "--process", choices=get_args(Process), help="of a network of score_sde, where its file does not tell"
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="height of the images, where a training state is not of a published size",
    )
    options, rest = parser.parse_known_args(arguments)
    words = ["sample", "--workdir", options.workdir, *rest]

    def write() -> None:
        check_backend()
        source, workdir = place(options.source), place(options.workdir)
        if options.experiment:
            if options.process or options.size:
                raise UserError("--process and --size are not of a state of gDDIM, which is of its --experiment")
            experiment = _parsed(load_experiment(options.experiment), words)
            step = convert(source, workdir, experiment, options.weights)
            again = shlex.join(["python", "-m", _module(options.experiment), *words])
            print(f"{options.workdir}: {options.weights} weights of step {step}; to sample them: {again}")
        else:
            if is_flax(source):
                raise UserError(f"{source} is a state of gDDIM, which tells no experiment: give --experiment NAME")
            published = read(source, options.weights, options.process, options.size)
            published = dataclasses.replace(published, experiment=_parsed(published.experiment, words))
            convert_published(published, workdir)
            step = f" of step {published.step}" if published.step else ""
            size = "×".join(map(str, published.experiment.data.shape))
            print(f"{options.workdir}: {options.weights} weights{step}, of {size} images, of {published.told}")

    return exit_status(write, "beside a training, JAX_PLATFORMS=cpu takes the host's", "no run is written")


def _parsed(experiment: Experiment, words: list[str]) -> Experiment:
    command = cli.parse(experiment, words)
    if command.dry_run or command.step is not None:
        raise UserError("--dry-run and --step are for the command that samples")
    return command.experiment
