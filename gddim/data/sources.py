"""What a data set is, and the two that need no file: the digits that scikit-learn carries and five rings of points."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped

from ..errors import UserError


@runtime_checkable
class Source(Protocol):
    """Random access to records of one shape: uint8 images `(H, W, C)` or float32 points `(C,)`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def flip(self) -> bool:
        """Whether a mirrored record is a record as good (faces, photographs) or not (digits, points)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Shaped[np.ndarray, "b ..."]: ...


@runtime_checkable
class Dataset(Protocol):
    """What an experiment names: building it reads nothing; `train` and `test` read, and raise UserError by name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*dims, C)` of a record."""
        ...

    def train(self) -> Source: ...

    def test(self) -> Source: ...


class ArraySource:
    """Records in memory or in a memory map: `array[rows]`, or all of `array` (N, *dims, C), uint8 or float32."""

    def __init__(
        self, array: Shaped[np.ndarray, "n *shape"], flip: bool = False, rows: Int[np.ndarray, " m"] | None = None
    ):
        if array.ndim < 2 or array.dtype not in (np.uint8, np.float32):
            raise UserError(f"records must be uint8 or float32 (N, *dims, C), not {array.dtype} {array.shape}")
        self.array = array
        self.flip = flip
        self.rows = rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __len__(self) -> int:
        return len(self.array if self.rows is None else self.rows)

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Shaped[np.ndarray, "b ..."]:
        return self.array[indices if self.rows is None else self.rows[indices]]


def data_folder(root: str | None) -> Path:
    """The folder of data sets: `root`, which must exist, else $GDDIM_DATA, which must too, else ~/.cache/gddim."""
    given = root or os.environ.get("GDDIM_DATA")
    if given is None:
        return Path.home() / ".cache" / "gddim"
    folder = Path(given).expanduser()
    if not folder.is_dir():
        origin = "data root" if root else "GDDIM_DATA"
        raise UserError(f"{origin} {given} is not a folder: make it, or name the folder that holds the data")
    return folder


def every_nth(n: int, every: int) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """Rows to train on and rows held out: every `every`-th is held out; 0 holds out none, and tests on all."""
    if every < 0 or every == 1:
        raise UserError(f"test_every must be 0 or at least 2, not {every}")
    rows = np.arange(n)
    if every == 0:
        return rows, rows
    held_out = rows % every == every - 1
    return rows[~held_out], rows[held_out]


@dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten 8×8 digits that scikit-learn carries: 1,500 to train, 297 held out.

    A digit has 17 grey levels v = 0 … 16, stored as x = `round(255 v / 16)`: levels stay distinct
    (v = `round(16 x / 255)`), and 0 and 16 are exactly -1 and 1 on the device. The split is
    `numpy.random.default_rng(0).permutation(1797)`, because scikit-learn's own order would hold out other
    writers than those trained on.
    """

    shape = (8, 8, 1)

    def train(self) -> ArraySource:
        return ArraySource(self._shuffled()[:1500])

    def test(self) -> ArraySource:
        return ArraySource(self._shuffled()[1500:])

    def _shuffled(self) -> np.ndarray:
        from sklearn.datasets import load_digits

        levels, _ = load_digits(return_X_y=True)
        images = np.round(levels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        return images[np.random.default_rng(0).permutation(len(images))]


@dataclass(frozen=True)
class FiveRings:
    """Points on five interlocked circles of radius 1, standardised to mean 0 and variance 1 in each coordinate.

    Centres `(−w, h), (0, h), (w, h), (−0.6 w, −h), (0.6 w, −h)` over 2, w = 3.5, h = 1.5; circle and angle are uniform.
    Mean and variance are those of the distribution: E c, and Var c + ½.
    """

    train_points: int = 50_000
    """Number of points to train on."""
    test_points: int = 10_000
    """Number of points held out, drawn independently."""
    seed: int = 0
    """Seed of both sets."""

    shape = (2,)

    def train(self) -> ArraySource:
        return ArraySource(self._draw(self.train_points, 0))

    def test(self) -> ArraySource:
        return ArraySource(self._draw(self.test_points, 1))

    def _draw(self, count: int, stream: int) -> Float[np.ndarray, "n 2"]:
        w, h = 3.5, 1.5
        centres = np.array([(-w, h), (0, h), (w, h), (-0.6 * w, -h), (0.6 * w, -h)]) / 2
        rng = np.random.default_rng([self.seed, stream])
        circle = rng.integers(len(centres), size=count)
        angle = rng.uniform(0, 2 * np.pi, count)
        points = centres[circle] + np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return ((points - centres.mean(0)) / np.sqrt(centres.var(0) + 0.5)).astype(np.float32)
