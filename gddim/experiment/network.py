"""What an experiment says of its network: its architecture, and what it predicts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import PRNGKeyArray

from gddim.data import NUMBERS, classes_of, cond_of
from gddim.errors import UserError, require
from gddim.experiment.spectrum import DataStd, Spectrum
from gddim.model import Denoiser, EpsModel, VelocityModel
from gddim.sde import AbstractLinearSDE
from gddim.settings import LATER


@runtime_checkable
class NetConfig(Protocol):
    """A network yet to be built, as `NCSNppConfig` and `MLPConfig` are."""

    def build(self, in_shape: Any, out_channels: int, key: PRNGKeyArray) -> Any: ...


def check_size(net: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `UserError` for a network, of a configuration that anybody may have written, so much larger than the parameters
    beside it that tracing it would take for ever.
    """
    numbers = [value for value in vars(net).values() if type(value) is int]  # of channels, features, classes, blocks
    levels = getattr(net, "multipliers", (1,))
    blocks = net.depth if hasattr(net, "depth") else net.blocks * len(levels)
    total = sum(array.size for array in arrays.values())
    squares = max(blocks, max(levels) ** 2) * net.width**2  # a block has one of its width at least
    if max(*numbers, squares) > total:
        raise UserError(f"it describes a network larger than its {total:,} parameters")


def told_classes(net: Any, data: Any) -> Any:
    """A network of as many classes as the data have. Raises `UserError` where it says that they are others."""
    classes, own = classes_of(data), getattr(net, "classes", None)
    if own == classes or own is None or (own and not classes and cond_of(data)):
        return net
    given = f"the data have {classes}" if classes else "the data have none, or are without --data.labels"
    require(not own, f"net.classes {own}: {given}")
    return replace(net, classes=classes)


def told_augmentation(net: Any, share: float, shape: tuple[int, ...]) -> Any:
    """A network that is told how images were augmented, where a share of them is. Raises `UserError` for one that takes no such
    thing, and for records that are no images.
    """
    if not share:
        return net
    own, kind = getattr(net, "augment", None), type(net).__name__.removesuffix("Config")
    require(len(shape) == 3, f"train.augment {share:g}: it is of images (H, W, C), and these are records {shape}")
    require(own is not None, f"train.augment {share:g}: a {kind} is not told of it, and would draw what is augmented")
    require(own in (0, NUMBERS), f"net.augment {own}: train.augment makes {NUMBERS} numbers")
    return replace(net, augment=NUMBERS)


@dataclass(frozen=True)
class Model:
    """What the network predicts."""

    predicts: Literal["data", "eps", "velocity"] = "data"
    """The data, preconditioned, by one network for every process; the noise ε in R coordinates, as published; or the ε of the
    velocity alone in L coordinates, as CLD-SGM publishes it."""
    data_std: DataStd = 0.5
    """Root mean square of the data, which preconditions the prediction of data: a number, or, for a process with
    coefficients by frequency, the file that python -m gddim.data std --spectrum wrote."""
    mixed_score: bool = False
    """Add that of the velocity, R⁻¹(0, v), to a predicted ε."""
    time_scale: float | None = field(default=None, metadata=LATER)
    """A network that predicts ε is told this times t as its noise level. None: 999, as published, or 1 of the velocity's."""
    time_offset: float = field(default=0.0, metadata=LATER)
    """Plus this."""

    def __post_init__(self):
        if not isinstance(self.data_std, Spectrum):
            require(0 < self.data_std < math.inf, f"data_std must be > 0, not {self.data_std}")
        predicts, scale, offset = self.predicts, self.time_scale, self.time_offset
        eps, given = predicts != "data", f"of a network that predicts {predicts}: accepted is a number"
        require(
            not self.mixed_score or eps,
            f"mixed_score is added to ε: a network that predicts eps or velocity is accepted, not {predicts}",
        )
        require(
            scale is None or (eps and 0 < scale < math.inf),
            f"time_scale {scale} {given} > 0, of one that predicts eps or velocity",
        )
        require(
            not offset or (predicts == "eps" and math.isfinite(offset)),
            f"time_offset {offset} {given}, of one that predicts eps",
        )

    @property
    def rms(self) -> float:
        """`data_std` in one number."""
        std = self.data_std
        return float(np.sqrt(np.mean(np.square(std.rms)))) if isinstance(std, Spectrum) else std

    def build(
        self, sde: AbstractLinearSDE, net: NetConfig, shape: tuple[int, ...], key: PRNGKeyArray
    ) -> Denoiser | EpsModel | VelocityModel:
        """The network of records `shape`, fresh, seen through a process. Raises `UserError` for a spectrum of other data."""
        *dims, channels = shape
        std, fields = self.data_std, sde.k * channels
        fits = not isinstance(std, Spectrum) or std.shape == tuple(dims)
        require(fits, f"model.data_std is a {std}, and the data are {tuple(dims)}")
        inputs = channels if self.predicts == "data" else fields
        try:
            built = net.build((*dims, inputs), fields if self.predicts == "eps" else channels, key)
        except UserError as error:
            raise UserError(f"records {shape}: {error}") from error
        match self.predicts:
            case "data":
                return Denoiser(sde, built, data_std=std.rms if isinstance(std, Spectrum) else std)
            case "eps":
                scale, offset = self.time_scale or 999.0, self.time_offset
                return EpsModel(sde, built, mixed_score=self.mixed_score, time_scale=scale, offset=offset)
            case _:
                return VelocityModel(sde, built, mixed_score=self.mixed_score, time_scale=self.time_scale or 1.0)
