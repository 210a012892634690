"""What was trained, wherever it lies: the newest or another checkpoint of a run, one of its averages, an exported file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
from etils import epath
from jaxtyping import PyTree

from gddim import weights as files
from gddim.averages import LONGEST
from gddim.checkpoint import Checkpointer
from gddim.data import classes_of
from gddim.errors import UserError, require
from gddim.experiment.checkpoints import checkpoint_digest
from gddim.experiment.config import Experiment
from gddim.experiment.fitting import SOLVERS
from gddim.experiment.network import check_size
from gddim.experiment.revival import revived
from gddim.experiment.snapshots import placed, rebuild
from gddim.experiment.workdir import RECORDS, check_release, read_config
from gddim.parallel import replicated
from gddim.sde import AbstractLinearSDE

Average = Literal["ema", "raw"] | float
"""Which parameters: the average that training keeps, those of the last step, or the average of a length σ_rel."""
HUB = "model.safetensors"  # in a folder, beside its config.json


def parse_average(word: str) -> Average:
    """The average that a word of a command line names. Raises `UserError` for one that is none."""
    if word in ("ema", "raw"):
        return word
    try:
        return float(word)
    except ValueError:
        raise UserError(f"weights {word}: accepted are ema, raw and a length σ_rel, as 0.07") from None


class Trained(NamedTuple):
    """A network with its parameters, and where they come from."""

    experiment: Experiment
    model: Any
    params: PyTree
    config: dict[str, Any]
    about: dict[str, Any]
    tables: str
    """The folder of the tables that were fitted to it."""

    @property
    def classes(self) -> int:
        """Of the data that it was trained on; 0 without labels."""
        return classes_of(self.experiment.data)

    @property
    def label_dropout(self) -> float:
        """The share of them that it was not told, in training."""
        return self.config.get("train", {}).get("label_dropout", 0.0)


def find(
    path: epath.Path,
    step: int | None = None,
    average: str | float | None = None,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    sde: AbstractLinearSDE | None = None,
    net: Any = None,
    data: Any = None,
) -> Trained:
    """The network in a workdir, a file or a folder as hubs have them, whole on every device of the mesh, else on the first.

    See `gddim.load` for the arguments and what is refused.
    """
    average = parse_average(average) if isinstance(average, str) else average
    if isinstance(average, int | float):
        require(0 < average <= LONGEST, f"weights {average:g}: a length σ_rel must lie in (0, {LONGEST:.3f}]")
    file = path / HUB if (path / HUB).exists() else path
    weights = None if file.is_dir() or not file.exists() else files.read(file)
    if weights and not (step is None and average is None):
        raise UserError(f"{file} holds one set of parameters: step and weights are of a run")
    config = weights.config if weights else read_config(path, str(path))
    if config is None:
        raise UserError(f"{path} holds no run: give the workdir of one, or a file of python -m gddim.export")
    try:
        check_release(str(path), config)
        told = data is not None or config.get(RECORDS, {}).get("shape")
        if weights and not told:  # which would be read where its data lay
            raise UserError("it does not tell the shape of its records: give the data as data=")
        experiment = _of_type(revived(config, sde, net, data), dtype)
        if weights and net is None:
            check_size(experiment.net, weights.arrays)
        model = eqx.filter_eval_shape(experiment.build, jax.random.key(0))
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(str(path)) else f"{path}: {message}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its configuration is none of a run ({error!r:.100})") from error
    sharding = replicated(mesh) if mesh else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    if weights:
        params, about = placed(shapes, weights.arrays, str(file)), weights.about | {"licence": weights.licence}
    else:
        params, about = _of_run(path, experiment, shapes, step, average, config)
    if mesh is None:  # committed to no device, so that they go where what they meet is
        params = jax.tree.map(lambda x: jax.numpy.asarray(jax.device_get(x)), params)
    return Trained(experiment, eqx.combine(params, static), params, config, about, os.fspath(tables_of(path)))


def tables_of(path: epath.Path) -> epath.Path:
    """The folder of the tables that are fitted to what a workdir, a file or a hub's folder holds."""
    if path.name == HUB:
        return path.parent / SOLVERS
    return path.with_suffix(f".{SOLVERS}") if path.suffix == ".safetensors" else path / SOLVERS


def _of_run(
    path: epath.Path, experiment: Experiment, shapes: PyTree, step: int | None, average: Average | None, config: dict
) -> tuple[PyTree, dict[str, Any]]:
    average = (experiment.sampling.ema or "ema") if average is None else average
    if isinstance(average, str):
        item = {"ema": "ema", "raw": "train.model"}[average]
        with contextlib.closing(Checkpointer(path / "checkpoints")) as saved:
            if not saved.any():
                shipped = f", or give {config['weights']}, its weights without one" if config.get("weights") else ""
                raise UserError(f"{path} holds a run without a checkpoint: train it first{shipped}")
            items, step = saved.restore({item: shapes}, step)
        params = items[item]
    else:
        params, step = rebuild(shapes, path, average, step)
    images = step * config.get("train", {}).get("batch", 0)
    return params, {"step": step, "images": images, "weights": average, "checkpoint": checkpoint_digest(params)}


def _of_type(experiment: Experiment, dtype: str | None) -> Experiment:
    """The experiment with its network computing in another type."""
    net: Any = experiment.net
    if dtype is None:
        return experiment
    if "dtype" not in getattr(net, "__dataclass_fields__", ()):
        raise UserError(f"dtype: {dtype} given, but a {type(net).__name__} computes in the type of its input")
    return dataclasses.replace(experiment, net=dataclasses.replace(net, dtype=dtype))
