"""What the verb `restore` is asked for: the measurement by its word, and how images are restored."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import equinox as eqx
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from gddim import measurements
from gddim.data.decoding import decoded
from gddim.errors import UserError, place, require
from gddim.experiment.config import Experiment
from gddim.experiment.guiding import check_denoiser
from gddim.experiment.options import UNGROUPED, tyro
from gddim.guidance import Measured
from gddim.measurements import Operator

TASKS = (
    "inpaint, srN (as sr2, sr4: N times fewer pixels a side), deblur[:STD] (a Gaussian of so many pixels, by default 1), "
    "colour, sense[:SHARE] (of as many random projections as that share of the numbers, by default 0.25)"
)


@dataclass(frozen=True)
class Restoration:
    """The verb restore: held-out images of which only a linear measurement is seen."""

    task: Annotated[
        str | None, tyro.conf.arg(name="task", prefix_name=False, help=f"What is measured of them: {TASKS}")
    ] = field(default=None, metadata={UNGROUPED: True})
    mask: Annotated[str | None, tyro.conf.arg(name="mask", prefix_name=False)] = field(
        default=None, metadata={UNGROUPED: True}
    )
    """Of inpaint: an image, or a .npy file, of the size of the data; what is white, or not 0, is missing. Without it the
    lower half is."""
    by: Literal["moments", "pseudoinverse", "replacement"] = "moments"
    """How a sample hears of the measurement: moments (MMPS), exact for Gaussian data, some vector-Jacobian products of the
    network a call; pseudoinverse (ΠGDM), one a call; replacement, none, and biased, less by --sampler repaint:16."""
    noise: float = 0.0
    """Standard deviation of the noise of the measurement, data being in [-1, 1]."""
    images: int = 4
    """Held-out images, the first ones."""
    samples: int = 4
    """Samples of each."""
    iterations: int = 2
    """Of conjugate gradients in each call, at most; by moments each takes a vector-Jacobian product, about two calls. More
    are exact for an exact network, and ask of a trained one's Jacobian what it does not know."""

    def __post_init__(self):
        require(0 <= self.noise < math.inf, f"restore.noise must be at least 0, not {self.noise:g}")
        for name in ("images", "samples", "iterations"):
            require(getattr(self, name) >= 1, f"restore.{name} must be at least 1, not {getattr(self, name)}")

    def operator(self, shape: tuple[int, ...]) -> Operator:
        """The measurement of images of this shape. Raises `UserError` for another word, and what does not fit them."""
        require(len(shape) == 3, f"restore measures images (H, W, C), and these are records {shape}")
        height, width, channels = shape
        word = self.task or ""
        name, _, number = word.partition(":")
        require(
            self.mask is None or word == "inpaint", f"--mask {self.mask} is of --task inpaint, not {word or 'none'}"
        )
        match re.sub(r"^sr\d+$", "srN", name), number:
            case "inpaint", "":
                return measurements.inpainting(self._missing(height, width))
            case "colour", "":
                require(channels > 1, f"--task colour: these images are grey, {shape}")
                return measurements.grey
            case "srN", "":
                n = int(name.removeprefix("sr"))
                fits = n > 1 and height % n == 0 == width % n
                require(
                    fits, f"--task {word}: {n} must be 2 or more and divide the sides of the images, {height}×{width}"
                )
                return measurements.pooling(n)
            case "deblur", _ if 0 < (std := _number(number or "1")) < math.inf:
                return measurements.blur(std, height, width)
            case "sense", _ if 0 < (share := _number(number or "0.25")) <= 1:
                return measurements.sensing(share, shape)
        raise UserError(f"--task {word or 'is missing'}: accepted are {TASKS}")

    def _missing(self, height: int, width: int) -> np.ndarray:
        """Which pixels are."""
        if self.mask is None:
            return np.broadcast_to(np.arange(height)[:, None] >= height // 2, (height, width))
        path = place(self.mask)
        try:
            if path.suffix == ".npy":
                with path.open("rb") as file:
                    mask = np.load(file, allow_pickle=False)
                if mask.dtype.kind not in "biuf" or not np.all(np.isfinite(mask)):
                    raise ValueError(f"it holds {mask.dtype}, or what is not finite: a mask is of numbers or booleans")
                mask = mask != 0
            else:
                mask = np.asarray(decoded(path.read_bytes(), 1, self.mask)) >= 128
        except Exception as error:  # whatever Pillow and NumPy make of other files
            raise UserError(f"--mask {self.mask} cannot be read: {str(error).splitlines()[0]}") from error
        require(
            mask.shape == (height, width),
            f"--mask {self.mask} is of shape {mask.shape}, the images are {height, width}",
        )
        require(bool(mask.any()), f"--mask {self.mask}: nothing is missing; what is white, or not 0, is to be filled")
        require(not mask.all(), f"--mask {self.mask}: all is missing, and nothing measured: that is the verb sample")
        return mask


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def check_restoration(experiment: Experiment, settings: Restoration) -> None:
    """Raise `UserError` for what cannot be restored by this network."""
    settings.operator(tuple(experiment.data.shape))
    check_denoiser(experiment, f"restore --task {settings.task}")


class Measuring(eqx.Module):
    """A denoiser under a measurement that stands with what conditions each sample: `{"measurement": b, "cond": …}`."""

    measured: Measured
    """Under one of them."""

    def __call__(self, y: Array, sigma: ArrayLike, cond: PyTree) -> Array:
        return replace(self.measured, measurement=cond["measurement"])(y, sigma, cond["cond"])
