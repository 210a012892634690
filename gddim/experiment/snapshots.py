"""What a run hands on in small files: snapshots of its averages, other lengths rebuilt of them, a state to begin with."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, PyTree

from gddim import compact
from gddim.averages import combination
from gddim.checkpoint import by_path, from_paths
from gddim.compact import Packed
from gddim.errors import UserError, from_extra
from gddim.experiment.config import Experiment
from gddim.experiment.plan import Plan
from gddim.parallel import agree, tell, to_host
from gddim.train import TrainState

SNAPSHOTS = "snapshots"


def snapshot(plan: Plan, workdir: epath.Path, step: int, state: TrainState) -> None:
    """Write the averages of a step; every process calls it, the first one writes."""
    names = average_names(len(plan.experiment.train.ema_profiles))
    trees = [jax.tree.map(to_host, tree) for tree in (state.ema, *state.averages)]
    if jax.process_index() == 0:
        flat = [by_path(tree) for tree in trees]
        leaves = [(path, leaf.shape) for path, leaf in flat[0].items()]
        vectors = dict(zip(names, map(compact.vector, flat), strict=True))
        about = {"widths": dict(zip(names, plan.experiment.train.ema_profiles, strict=True))}
        ways = dict.fromkeys(names, "near") | {names[0]: "whole"}
        compact.write(workdir / SNAPSHOTS / str(step), Packed(step, leaves, vectors, ways, about))


def drop_snapshots(workdir: epath.Path, after: int) -> list[int]:
    """Delete those of later steps, which training that was not saved has left; returns their steps. What was copied there
    under another name than a step's stays.
    """
    folder = workdir / SNAPSHOTS
    named = [int(each.name) for each in folder.iterdir() if each.name.isdigit()] if folder.is_dir() else []
    left = sorted(step for step in named if step > after)
    for step in left:
        (folder / str(step)).rmtree()
    return left


def average_names(count: int) -> list[str]:
    """How a state calls its averages."""
    return ["ema", *(f"averages.{i}" for i in range(count - 1))]


def check_rebuildable(experiment: Experiment, workdir: epath.Path, training: bool, measured: bool) -> None:
    """Raise `UserError` where `sampling.ema`, or `eval.ema` of a table, asks for what no snapshot will tell."""
    asked = {"--sampling.ema": experiment.sampling.ema, "--eval.ema": measured and experiment.eval.ema}
    for option in (option for option, given in asked.items() if given):
        if training and not (experiment.train.snapshot_every and experiment.train.ema_profiles):
            raise UserError(
                f"{option} is made of snapshots: give --train.ema-profiles 0.05 0.1 and --train.snapshot-every"
            )
        if not training:
            check_snapshots(workdir, option)


def check_snapshots(workdir: epath.Path, option: str = "--sampling.ema") -> None:
    """Raise `UserError`, naming the option that asks for them, where a run has no snapshots."""
    _snapshots(workdir, option)


def rebuild(shapes: PyTree, workdir: epath.Path, sigma_rel: float, step: int | None) -> tuple[PyTree, int]:
    """The average of length `sigma_rel` at the newest snapshot up to `step`, and the step of that."""
    told = [each for each in _snapshots(workdir) if step is None or each[0] <= step]
    if not told:
        raise UserError(f"--sampling.ema {sigma_rel}: {workdir / SNAPSHOTS} has no snapshot up to step {step}")
    seen = zlib.crc32(repr([each[:2] for each in told]).encode())
    if not agree(seen, lambda all_of_them: len({*all_of_them.tolist()}) == 1):
        raise UserError(f"{workdir / SNAPSHOTS} is not the same on all hosts, as while one is written: try again")
    end = max(step for step, _, _, _ in told)
    weights, left = combination([each[0] for each in told], [each[1] for each in told], end, sigma_rel)
    total: dict[str, np.ndarray] = {}
    for folder in dict.fromkeys(folder for _, _, folder, _ in told):
        packed = compact.read(folder)
        for weight, (_, _, where, name) in zip(weights, told, strict=True):
            if where == folder:
                for path, leaf in packed.tree(name).items():
                    total[path] = total.get(path, 0) + weight * leaf.astype(np.float64)
    tell(f"average of σ_rel {sigma_rel:g} at step {end}: of {len(told)} snapshots, its profile missed by {left:.2g}")
    return placed(shapes, total, str(workdir / SNAPSHOTS)), end


def _snapshots(workdir: epath.Path, option: str = "--sampling.ema") -> list[tuple[int, float, epath.Path, str]]:
    """Step, σ_rel, folder and name of each average that is there, also in states that were copied there."""
    folder = workdir / SNAPSHOTS
    found: dict[tuple[int, float], tuple[epath.Path, str]] = {}
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        if compact.holds_state(each):
            step, about = compact.peek(each)
            found |= {(step, width): (each, name) for name, width in about["widths"].items() if step > 0}
    if not found:
        raise UserError(f"{option} is made of snapshots, and {folder} has none: train with --train.snapshot-every")
    return [(step, width, where, name) for (step, width), (where, name) in sorted(found.items())]


def state_of(plan: Plan, folder: epath.Path) -> tuple[TrainState, dict[str, Any], list[str]]:
    """The state in a folder that `gddim.export` wrote, the configuration it was of, and which moments of Adam it has.

    Raises `UserError` for another network, or other averages.
    """
    with from_extra("train"):
        import optax

    packed, shapes, where = compact.read(folder), plan.shapes, str(folder)
    if "config" not in packed.about:
        raise UserError(
            f"{folder} is a snapshot of averages, no state: python -m gddim.export RUN DIR --state writes one"
        )
    wanted, widths = plan.experiment.train.ema_profiles, tuple(packed.about["widths"].values())
    if widths != wanted:
        raise UserError(f"{folder} holds averages of σ_rel {[*widths]}, train.ema_profiles are {[*wanted]}")
    names = average_names(1 + len(shapes.averages))
    ema, *others = (placed(shapes.ema, packed.tree(name), where) for name in names)
    opt_state = jax.jit(plan.optimizer.init, out_shardings=plan.shardings.opt_state)(
        model := placed(shapes.model, packed.tree("model"), where)
    )
    moments = {name: packed.tree(name) for name in ("mu", "nu") if name in packed.vectors}
    if moments:
        shaped = {name: optax.tree_utils.tree_get(shapes.opt_state, name) for name in moments}
        count = optax.tree_utils.tree_get(opt_state, "count")
        count = jax.device_put(jnp.asarray(packed.about["count"], count.dtype), count.sharding)
        found = {name: placed(shaped[name], tree, where) for name, tree in moments.items()}
        opt_state = optax.tree_utils.tree_set(opt_state, count=count, **found)
    step = jax.device_put(jnp.asarray(packed.step, jnp.int32), shapes.step.sharding)
    return TrainState(step, model, ema, opt_state, tuple(others)), packed.about["config"], [*moments]


def placed(shapes: PyTree, arrays: dict[str, np.ndarray], where: str) -> PyTree:
    """A tree of the arrays, each in its shards. Raises `UserError` where the model is another."""
    wanted = by_path(shapes)
    for path in sorted(wanted.keys() | arrays.keys()):
        ours = tuple(wanted[path].shape) if path in wanted else None
        theirs = arrays[path].shape if path in arrays else None
        if ours != theirs:
            raise UserError(
                f"{where} is of another model: {path}: saved {theirs or 'nowhere'}, wanted {ours or 'nowhere'}"
            )

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
        array = arrays[path].astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return from_paths(shapes, {path: place(path, leaf) for path, leaf in wanted.items()})
