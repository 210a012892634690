"""Runs that tests make without training: a checkpoint of parameters drawn at random, whose network says something."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import gddim
from gddim.data import ArraySource, classes_of, identity
from gddim.experiment import Experiment, Model, Sampling, Training
from gddim.experiment.checkpoints import checkpoints, items_of
from gddim.experiment.plan import Plan
from gddim.experiment.revival import objects
from gddim.experiment.workdir import OBJECTS, RECORDS, describe, write_config
from gddim.nn import NCSNppConfig

NET = NCSNppConfig(
    width=4, multipliers=(1, 1), blocks=1, attention=(), embedding="positional", fir=False, progressive_input="none"
)


@dataclasses.dataclass(frozen=True)
class Colours:
    """Small colour images: a data set of somebody's own."""

    count: int = 16
    shape = (8, 8, 3)

    def train(self) -> ArraySource:
        rng = np.random.default_rng(0)
        return ArraySource(rng.integers(0, 256, (self.count, *self.shape)).astype(np.uint8))

    test = train


@dataclasses.dataclass(frozen=True)
class LabelledColours:
    """The same images, of classes in turn."""

    classes: int
    shape = Colours.shape

    def train(self) -> ArraySource:
        images = Colours().train().array
        return ArraySource({"x0": images, "label": np.arange(len(images), dtype=np.int32) % self.classes})

    test = train


COLOUR = Experiment(
    name="colour",
    sde=gddim.VP(),
    net=NET,
    data=Colours(),
    model=Model(data_std=0.5),
    train=Training(steps=2, batch=8),
    sampling=Sampling(samples=8, batch=8, nfe=4),
)


class Nought(eqx.Module):
    """0, of which a preconditioned denoiser is exact."""

    weight: jax.Array

    def __call__(self, x, level, cond=None, *, key=None):
        return 0 * self.weight * x


@dataclasses.dataclass(frozen=True)
class NoughtConfig:
    width: int = 1

    def build(self, in_shape, out_channels, key):
        return Nought(jnp.ones(()))


WHITE = dataclasses.replace(COLOUR, net=NoughtConfig(), sampling=dataclasses.replace(COLOUR.sampling, nfe=8))


def make_run(workdir: Path, experiment: Experiment = COLOUR, steps: tuple[int, ...] = (1, 2), **config: Any) -> Path:
    """A run of an experiment with other parameters at each step, and others again that are not averaged."""
    plan, folder = Plan(experiment), epath.Path(workdir)
    records, classes = identity(experiment.data.train(), None), classes_of(experiment.data)
    records |= {"classes": classes} if classes else {}
    told = describe(experiment) | {RECORDS: records, OBJECTS: objects(experiment)}
    with contextlib.closing(checkpoints(experiment, folder)) as saved:
        for step in steps:
            state = eqx.tree_at(lambda s: s.step, plan.init(), jnp.asarray(step, jnp.int32))
            rng = np.random.default_rng(step)
            noise = lambda x, rng=rng: np.asarray(x) + rng.normal(0, 0.2, x.shape).astype(np.float32)
            state = dataclasses.replace(
                state, ema=jax.tree.map(noise, state.ema), model=jax.tree.map(noise, state.model)
            )
            state = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, plan.shapes)
            saved.save(step, items_of(state), describe(experiment))
    write_config(folder, {name: value for name, value in (told | config).items() if value is not None})
    return workdir
