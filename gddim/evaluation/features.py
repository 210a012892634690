"""Feature spaces: functions from samples to vectors, in which two sets of samples are compared."""

import math
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Shaped

from gddim.data import to_unit
from gddim.errors import UserError

LARGEST = 2**15  # numbers of a record as they are: their covariance takes 8 GiB


@runtime_checkable
class FeatureSpace(Protocol):
    """What `Statistics` are taken in: a module whose call runs inside a compiled program, on a batch."""

    @property
    def name(self) -> str:
        """Tells two spaces apart whose distances may not be compared, resize rule and weights included."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """What a table shows for it, of the names that `statistics.compare` knows."""
        ...

    @property
    def chunk(self) -> int:
        """Samples that one device takes at a time."""
        ...

    def __call__(self, samples: Shaped[Array, "b ..."], /) -> Float[Array, "b d"]: ...

    def details(self, samples: Shaped[np.ndarray, "b ..."], /) -> dict[str, Any]:
        """What else is to be known of its features, for which these are some samples; their `shape`, where features of
        others cannot be compared."""
        ...

    def probabilities(self, features: Float[np.ndarray, "b d"], /) -> Float[np.ndarray, "b classes"] | None:
        """Class probabilities for the Inception Score; None where there are no classes."""
        ...


def check_numbers(space: FeatureSpace, shape: tuple[int, ...]) -> None:
    """Raise `UserError` for records of so many numbers that their covariance has no room."""
    count = math.prod(shape)
    if isinstance(space, PixelFeatures) and count > LARGEST:
        raise UserError(
            f"records {shape} are {count:,} numbers, whose covariance takes {8 * count**2 / 2**30:,.0f} GiB: as pixels "
            f"{LARGEST:,} are accepted; take Inception features, or smaller images"
        )


class PixelFeatures(eqx.Module):
    """The numbers themselves, flattened: pixels in [-1, 1], coordinates of points. For data too small for a network."""

    name: str = eqx.field(static=True, default="pixels")
    metrics: tuple[str, ...] = eqx.field(static=True, default=("frechet", "energy", "precision_recall"))
    chunk: int = eqx.field(static=True, default=1024)

    def __call__(self, samples: Shaped[Array, "b ..."]) -> Float[Array, "b d"]:
        return to_unit(samples).reshape(len(samples), -1)

    def details(self, samples: Shaped[np.ndarray, "b ..."]) -> dict[str, Any]:
        return {"shape": list(samples.shape[1:])}  # whose order of numbers is that of no other shape

    def probabilities(self, features: Float[np.ndarray, "b d"]) -> None:
        return None
