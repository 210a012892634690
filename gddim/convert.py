"""`python -m gddim.convert SOURCE WORKDIR --experiment NAME`: a checkpoint that gDDIM's authors published, as a run.

SOURCE is a training state in flax's msgpack format. The run in WORKDIR is one that `python -m experiments.NAME sample`
and `evaluate` take; `train` goes on from it with fresh moments of Adam. Options of the experiment may follow, as
`--net.width 64`, for a network that differs from the experiment's.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import math
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gddim.errors import UserError, place, printable
from gddim.nn import NCSNpp
from gddim.parallel import check_backend

if TYPE_CHECKING:
    from gddim.experiment import Experiment

M = TypeVar("M")

WEIGHTS = {"ema": ("params_ema",), "raw": ("optimizer", "target")}
BLOCK = {"norm_in": "GroupNorm_0", "conv_in": "Conv_0", "time": "Dense_0", "norm_out": "GroupNorm_1",
         "conv_out": "Conv_1", "shortcut": "Conv_2"}  # fmt: skip
ATTENTION = {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"}
TOP = {"time.0": "Dense_0", "time.1": "Dense_1", "conv_in": "Conv_0", "norm_out": "GroupNorm_0", "conv_out": "Conv_1"}


def load_flax(path: epath.PathLike, model: M, weights: Literal["ema", "raw"] = "ema") -> M:
    """The model with the parameters of a published training state, the averaged ones or the raw ones.

    `model` is an `NCSNpp` or holds one as `.net`; its own parameters serve as shapes, so `eqx.filter_eval_shape` of
    its construction will do. Raises `UserError` naming every parameter that is missing, unexpected or of another
    shape, by its published path.
    """
    return assign(read_state(path), model, weights, epath.Path(path))


def read_state(path: epath.PathLike) -> dict[str, Any]:
    """A flax msgpack file as nested dictionaries of NumPy arrays, by hand: neither flax nor pickle is involved."""
    import msgpack

    path = epath.Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        state = _join(msgpack.unpackb(content, ext_hook=_extension, strict_map_key=False))
    except Exception as error:  # whatever msgpack and NumPy make of bytes that are not theirs
        raise UserError(f"{path} is no flax msgpack file, or not all of it: {error!r:.200}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a training state")
    return state


def assign(state: dict[str, Any], model: M, weights: Literal["ema", "raw"], source: Any) -> M:
    """`load_flax` of a state that has been read; `source` is what errors call it."""
    net = getattr(model, "net", model)
    if not isinstance(net, NCSNpp):
        raise UserError(f"published checkpoints hold an NCSNpp, not a {type(net).__name__}")
    place, tree = WEIGHTS[weights], state
    for word in place:
        tree = tree.get(word) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise UserError(f"{source} holds no {'.'.join(place)}, where {weights} weights are; it has {', '.join(state)}")
    found = dict(_flatten(tree["params"] if set(tree) == {"params"} else tree))
    names = published_names(net)
    _check({name: shape for each in names for name, shape in each.items()}, found, source)
    loaded = [np.stack([np.asarray(found[name], np.float32) for name in each]) for each in names]
    leaves = [value.reshape(leaf.shape) for value, leaf in zip(loaded, jax.tree.leaves(net), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(model), map(jnp.asarray, leaves))


def published_names(net: NCSNpp) -> list[dict[str, tuple[int, ...]]]:
    """For each of our parameters, in the tree's order, the published ones that are stacked in it: paths and shapes.

    Flax numbers the modules of a class in the order of their calls, which is the order of our tree.
    """
    numbers: dict[str, range] = {}
    count: collections.Counter[str] = collections.Counter()
    fir = net.config.fir

    def name(path: str, i: int, stacked: int) -> str:
        def module(kind: str, place: str) -> str:
            if place not in numbers:
                numbers[place] = range(count[kind], count[kind] + stacked)
                count[kind] += stacked
            return f"{kind}_{numbers[place][i]}"

        *words, leaf = path.split(".")
        place, last = ".".join(words[:-1]), words[-1] if words else ""
        if path == "frequencies":
            return "GaussianFourierProjection_0/W"
        if words[-2:-1] == ["attention"]:
            leaf = leaf if last == "norm" else {"weight": "W", "bias": "b"}[leaf]
            return f"{module('AttnBlockpp', place)}/{ATTENTION[last]}/{leaf}"
        if last == "progressive" and fir:
            return f"{module('Downsample', '.'.join(words))}/Conv2d_0/{leaf}"
        leaf = "kernel" if leaf == "weight" else leaf
        if last == "progressive":
            return f"{module('Downsample', '.'.join(words))}/Conv_0/{leaf}"
        if ".".join(words) in TOP:
            return f"{TOP['.'.join(words)]}/{leaf}"
        return f"{module('ResnetBlockBigGANpp', place)}/{BLOCK[last]}/{leaf}"

    names = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(net):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        stacked, shape = (leaf.shape[0], leaf.shape[1:]) if ".runs." in path else (1, leaf.shape)
        names.append({name(path, i, stacked): shape for i in range(stacked)})
    return names


def _check(wanted: dict[str, tuple[int, ...]], found: dict[str, Any], source: Any) -> None:
    """Raise `UserError` with every parameter that does not match."""
    lines = [f"missing: {name} {wanted[name]}" for name in wanted if name not in found]
    for name, value in found.items():
        shape, kind = np.shape(value), getattr(value, "dtype", type(value).__name__)
        if name not in wanted:
            lines.append(f"unexpected: {name} {shape}")
        elif shape != wanted[name]:
            lines.append(f"shape: {name} is {shape}, the network's {wanted[name]}")
        elif not (isinstance(value, np.ndarray) and jnp.issubdtype(kind, jnp.floating)):
            lines.append(f"type: {name} is {kind}, not floating")
        elif not np.isfinite(value.astype(np.float32)).all():
            lines.append(f"values: {name} is not finite")
    if lines:
        raise UserError(
            f"{source} does not fit this network; {len(lines)} parameter(s) do not match:\n  " + "\n  ".join(lines)
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _extension(code: int, data: bytes) -> Any:
    """Flax's extension types: 1 an array, 2 a complex number, 3 a scalar; each a packed tuple."""
    import msgpack

    if code not in (1, 2, 3):
        raise ValueError(f"extension type {code}")
    if code == 2:
        return complex(*msgpack.unpackb(data))
    shape, name, values = msgpack.unpackb(data)
    dtype = jnp.dtype(name)  # knows bfloat16
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"{len(values)} bytes for an array {shape} of {name}")
    return np.frombuffer(values, dtype).reshape(shape)


def _join(tree: Any) -> Any:
    """Arrays of a gigabyte and more are stored in pieces; here they become whole."""
    if not isinstance(tree, dict):
        return tree
    if "__msgpack_chunked_array__" not in tree:
        return {name: _join(value) for name, value in tree.items()}
    shape, chunks = ([part[str(i)] for i in range(len(part))] for part in (tree["shape"], tree["chunks"]))
    return np.concatenate(chunks).reshape([int(n) for n in shape])


def convert(
    source: epath.PathLike, workdir: epath.PathLike, experiment: Experiment, weights: Literal["ema", "raw"] = "ema"
) -> int:
    """Write a published training state as a run of `experiment` into a new or empty folder; returns its step.

    The averaged parameters are those of `weights`, the others the raw ones where there are any. Raises `UserError`,
    with nothing written, for a source or a folder that will not do.
    """
    from gddim.experiment.checkpoints import checkpoints, items_of
    from gddim.experiment.plan import Plan
    from gddim.experiment.workdir import describe, read_config, reserved, write_config
    from gddim.train import TrainState

    workdir = epath.Path(workdir).expanduser()
    if experiment.model.predicts != "eps":
        raise UserError(f"published networks predict ε: {experiment.name} needs --model.predicts eps")
    if read_config(workdir) is not None:
        raise UserError(f"{workdir} holds a run already and is not overwritten: give a new or an empty folder")
    plan = Plan(experiment)
    state = read_state(source)
    shapes = eqx.combine(plan.shapes.model, plan.static)
    ema = assign(state, shapes, weights, source)
    raw = assign(state, shapes, "raw", source) if "optimizer" in state else ema
    step = np.asarray(state.get("step", 0))
    if step.shape or not np.issubdtype(step.dtype, np.integer) or not 0 <= step < 2**31:
        raise UserError(f"{source}: its step is {state['step']!r:.60}, no number of steps")
    step = step.astype(np.int32)
    fresh = TrainState.create(raw, plan.optimizer, len(plan.shapes.averages))
    made = dataclasses.replace(fresh, step=jnp.asarray(step), ema=eqx.filter(ema, eqx.is_inexact_array))
    with reserved(workdir):
        with contextlib.closing(checkpoints(experiment, workdir)) as saved:
            saved.save(int(step), items_of(made), describe(experiment))
        write_config(workdir, describe(experiment))  # last: without it the folder is no run
    return int(step)


def load_experiment(name: str) -> Experiment:
    """The `EXPERIMENT` of `experiments.NAME`, or of the module of that name where it has a dot."""
    try:
        return importlib.import_module(_module(name)).EXPERIMENT
    except (ImportError, AttributeError) as error:
        raise UserError(f"--experiment {name}: {error}; give the name of a module with an EXPERIMENT") from None


def _module(name: str) -> str:
    return name if "." in name else f"experiments.{name}"


def main(arguments: list[str] | None = None) -> int:
    printable()
    parser = argparse.ArgumentParser(
        "python -m gddim.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="Options of the experiment: see python -m experiments.NAME --help",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint file, local or gs://…")
    parser.add_argument("workdir", metavar="WORKDIR", help="a new or an empty folder for the run")
    parser.add_argument("--experiment", metavar="NAME", required=True, help="as in python -m experiments.NAME")
    parser.add_argument("--weights", choices=tuple(WEIGHTS), default="ema", help="averaged (default) or raw parameters")
    options, rest = parser.parse_known_args(arguments)
    from gddim.experiment import cli

    try:
        check_backend()
        experiment = load_experiment(options.experiment)
        command = cli.parse(experiment, ["sample", "--workdir", options.workdir, *rest])
        if command.dry_run or command.step is not None:
            raise UserError("--dry-run and --step are for the command that samples")
        experiment = command.experiment
        step = convert(place(options.source), place(options.workdir), experiment, options.weights)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", _module(options.experiment), "sample", "--workdir", options.workdir, *rest])
    print(f"{options.workdir}: {options.weights} weights of step {step}; to sample them: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
