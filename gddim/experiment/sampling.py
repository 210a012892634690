"""How samples of an experiment are drawn, and what guides them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gddim.averages import LONGEST
from gddim.errors import UserError, require
from gddim.experiment.options import SPELLED, UNGROUPED, tyro
from gddim.experiment.words import Process, Sampler, TimeGrid, spell_process
from gddim.guidance import EVERYWHERE, Guidance
from gddim.samplers import Grid, Method, OnGrid, power_grid
from gddim.samplers.words import ACCEPTED, BEST, GRIDS, laid_out
from gddim.sde import AbstractLinearSDE
from gddim.sde.base import last_time
from gddim.sde.words import process_name
from gddim.settings import LATER

TIMES = ("power", "t_min")
"""Fields of `Sampling` whose value belongs to one process."""


@dataclass(frozen=True)
class Guide:
    """Guidance: samples are drawn away from what a worse network says, `D_worse + scale (D − D_worse)`."""

    scale: float = 1.0
    """1: none; more is sharper, and less varied; 0 is the worse network. It is the same one told no class (classifier-free
    guidance, of a run trained with labels and label dropout), or, with checkpoint or ema, that (autoguidance)."""
    interval: tuple[float, ...] = ()
    """LOW HIGH: guidance acts where the noise has a standard deviation σ in (LOW, HIGH], data being in [-1, 1]."""
    checkpoint: int | None = None
    """Step of an earlier checkpoint of the run, the worse network."""
    ema: float = 0.0
    """Length σ_rel of another average, the worse network's, rebuilt as sampling.ema is; 0: that which training keeps."""

    def __post_init__(self):
        require(math.isfinite(self.scale) and self.scale >= 0, f"guide.scale must be at least 0, not {self.scale:g}")
        told = " ".join(f"{x:g}" for x in self.interval)
        rising = not self.interval or (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1])
        require(rising, f"guide.interval {told}: accepted are two numbers, 0 <= LOW < HIGH")
        require(0 <= self.ema <= LONGEST, f"guide.ema must lie in [0, {LONGEST:.3f}], not {self.ema}")

    @property
    def acts(self) -> bool:
        """Whether samples are guided at all."""
        return self.scale != 1

    def check(self) -> None:
        """Raise `UserError` for what is told of guidance where there is none."""
        given = [name for name in ("interval", "checkpoint", "ema") if getattr(self, name) not in ((), None, 0.0)]
        require(self.acts or not given, f"guide.{(given or [''])[0]} needs a guide.scale other than 1, as 2")

    @property
    def by_worse(self) -> bool:
        """Whether another network of the run guides them, and not the same one without a class."""
        return self.checkpoint is not None or self.ema > 0

    def __str__(self) -> str:
        parts = [f"scale {self.scale:g}"]
        parts += [f"σ from {self.interval[0]:g} to {self.interval[1]:g}"] if self.interval else []
        parts += [f"away from step {self.checkpoint}"] if self.checkpoint is not None else []
        return ", ".join(parts + ([f"away from σ_rel {self.ema:g}"] if self.ema else []))

    def away_from(self, worse: Any = None) -> Guidance:
        """It as a function from models to a model, with the worse model where there is one."""
        low, high = self.interval or EVERYWHERE
        return Guidance(self.scale, (low, high), None if worse is None else worse.denoiser)


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: by `sample`, for the grids while training, and where an evaluation does not say."""

    sampler: Annotated[Sampler, tyro.conf.arg(name="sampler", prefix_name=False, help=ACCEPTED)] = field(
        default=BEST, metadata={UNGROUPED: True}
    )
    process: Annotated[Process, tyro.conf.arg(name="process", prefix_name=False)] = field(
        default=None, metadata={UNGROUPED: True, SPELLED: spell_process}
    )
    """What they are drawn through: own, or, by a network that predicts the data, or the ε of one field, vp, cosine, subvp, ve,
    flow, cld, psld, langevin or module:object, each with its parameters (cld:gamma=0.1, langevin:order=4)."""
    nfe: int = 50
    """Network calls a sample, the last step's included."""
    samples: int = 64
    """Number of samples."""
    batch: int = 64
    """How many at a time, over all devices. Another number is another program of XLA's, and changes samples by rounding:
    up to 0.3 % of 8-bit pixels were seen to differ, by one level."""
    power: float | None = None
    """Times are uniform in t^(1/power), those of the process, for samplers that bring no grid; without it 2, for ve 7. That of
    a run is of its process alone, as t-min is; one that is given here, of every process."""
    grid: Annotated[
        TimeGrid,
        tyro.conf.arg(
            help=f"Another layout of the times, of every sampler that brings none: {GRIDS}. The unit of tuned, band, residual "
            "and free is 0.5 √(n/64) for data of n numbers, 3.46 for CIFAR-10, at least 0.5, unless sampler or grid say "
            "another; the lower end of a band that is not told, up to 4 steps of one field and beyond 10, in units of at most "
            "0.5."
        ),
    ] = field(default=None, metadata={SPELLED: lambda grid: grid and str(grid)})
    t_min: float | None = None
    """Time of the process at which the sampler stops; without it 0.001 of the horizon, for ve 0.002 of its 80. The verb
    likelihood begins at a hundredth of these, whatever is told here."""
    last: Literal["none", "euler", "data"] = "none"
    """One more network call, from t_min to 0: an Euler step of the reverse SDE without noise, or the predicted data."""
    seed: int = 0
    """Sample i depends on the checkpoint, the process, the sampler, this and i."""
    classes: Annotated[
        tuple[int, ...], tyro.conf.arg(name="classes", prefix_name=False, aliases=["--sampling.classes"])
    ] = field(default=(), metadata=LATER)
    """Those that samples are of, one after another in turn, by a run with --data.labels: without it all of the data; -1 is
    none, which train.label-dropout has the network learn. Sample i depends on its class, too."""
    per_class: Annotated[int, tyro.conf.arg(name="per-class", prefix_name=False, aliases=["--sampling.per-class"])] = (
        field(default=0, metadata=LATER)
    )
    """Samples of each class, whose pictures are a row, in place of sampling.samples; 0: none such."""
    ema: float = 0.0
    """Length σ_rel of the average that is sampled after training, rebuilt from the run's snapshots up to the step, at the
    last of them (train.snapshot_every); 0: the average that training keeps."""
    guide: Annotated[Guide, tyro.conf.arg(name="guide", prefix_name=False)] = field(
        default=Guide(), metadata={UNGROUPED: True} | LATER
    )
    """What guides them."""

    def end(self, sde: AbstractLinearSDE) -> float:
        """The time of a process at which the sampler stops."""
        return sde.grid_end * sde.horizon if self.t_min is None else self.t_min

    def method(self, sde: AbstractLinearSDE, shape: tuple[int, ...]) -> Method:
        """How, whichever and however many samples of a process, for data of a shape."""
        sampler = laid_out(self.sampler, self.grid, self.power).for_data(shape)
        power = sde.grid_power if self.power is None else self.power
        return Method(sampler, self.nfe, power, self.end(sde), self.last)

    def through(self, process: AbstractLinearSDE | None, own: AbstractLinearSDE) -> Sampling:
        """The same through a process, None being the run's `own`; through another than before without the times of that."""
        kept = (process or own) == (self.process or own)
        return replace(self, process=process, **dict.fromkeys(() if kept else TIMES))

    def class_of(self, numbers: Any, classes: int) -> Any:
        """The class of each sample, by their numbers, int32, of a run with so many classes."""
        each = jnp.asarray(self.classes or range(classes), jnp.int32)
        return each[numbers // max(self.per_class, 1) % len(each)]

    def flow_grid(self, sde: AbstractLinearSDE, shape: tuple[int, ...], steps: int) -> Float[np.ndarray, " n"]:
        """Times between which the probability flow goes both ways: they begin where something is left of the data.

        Raises `UserError` for a grid that the process, or so few steps, do not have.
        """
        grid = self.grid or Grid("power", (self.method(sde, shape).power,))
        try:
            return (
                OnGrid(self.sampler, grid).for_data(shape).times(sde, power_grid(last_time(sde), self.end(sde), steps))
            )
        except ValueError as error:
            raise UserError(f"sampling.grid {grid}, {steps} steps of {process_name(sde)}: {error}") from error

    def __post_init__(self):
        for name in ("nfe", "samples", "batch"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("power", "t_min"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be > 0, not {value}")
        require(self.per_class >= 0, f"per_class must be at least 0, not {self.per_class}")
        require(self.power is None or self.grid is None, "give grid or power, not both")
        require(0 <= self.seed < 2**31, f"seed must be in [0, 2³¹), not {self.seed}")
        require(0 <= self.ema <= LONGEST, f"ema must lie in [0, {LONGEST:.3f}], not {self.ema}")
