"""What a reader makes of a published checkpoint: a run's experiment, its network, and its step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import equinox as eqx
import jax
import numpy as np

from gddim.convert.networks import Names, fill
from gddim.errors import UserError
from gddim.experiment import Experiment
from gddim.experiment.network import check_size
from gddim.experiment.options import tyro
from gddim.torch_reader import refusing


@dataclass(frozen=True)
class Elsewhere:
    """Records that were never here: what a published network was trained on, of which its shape is known."""

    shape: tyro.conf.Suppress[tuple[int, ...]]
    classes: tyro.conf.Suppress[int] = 0

    def train(self) -> NoReturn:
        raise UserError(f"the {self.shape} records that this network was trained on are not here: give your own data")

    def test(self) -> NoReturn:
        self.train()


@dataclass(frozen=True)
class Published:
    """A checkpoint that has been read.

    `experiment`: of the run that it becomes; options of a command line may replace it by one that the file does not tell
    apart from it, as another schedule.
    `arrays`: the parameters, in our layout, by their published names.
    `names`: which of them each parameter of the network is.
    `step`: how long it was trained.
    `told`: what to say of it: the format, and what was assumed.
    """

    source: Any
    experiment: Experiment
    arrays: dict[str, np.ndarray]
    names: Any
    step: int
    told: str

    @cached_property
    def model(self) -> Any:
        """The network seen through its process, an Equinox module. Raises `UserError` for parameters that do not fit."""
        with refusing(self.source, "checkpoint of a network that can be built"):  # its options may be of any type
            check_size(self.experiment.net, self.arrays)
            shapes = eqx.filter_eval_shape(self.experiment.build, jax.random.key(0))
            names: Names = self.names(shapes.net)
        return dataclasses.replace(shapes, net=fill(shapes.net, names, self.arrays, self.source))
