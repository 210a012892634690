"""What a data set is, and those that are made here: the digits that scikit-learn carries, and five rings."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, PyTree, Shaped

from gddim.errors import UserError, from_extra
from gddim.settings import LATER

_CHUNK = 1024
DATA, LABEL = "x0", "label"  # the data of a record, where it is a dictionary, and the number of its class
_CHANNELS = (1, 2, 3, 4)
# By the axes of an array, what floating images in [-1, 1] fall below somewhere, and those of another range nowhere: in
# [0, 1] or [-0.5, 0.5] up to rounding; without an axis of channels these may be series, and only [0, 1] is told from them.
DARK = {4: -0.51, 3: -0.01}
SCALE = "scale those of [0, 1] by 2x - 1, those of [-0.5, 0.5] by 2x, or store uint8"


Records = PyTree[Shaped[np.ndarray, "b ..."]]
"""Data `(b, *dims, C)`, or a dictionary of them by the name "x0" and of what conditions the network by any others."""


@runtime_checkable
class Source(Protocol):
    """Random access to records: uint8 images `(H, W, C)` or float32 points `(C,)`, or either with what conditions it.

    `source[indices]` are the data of these records, `(b, *dims, C)`, or a dictionary of arrays with a record a row,
    `{"x0": images, "label": classes}`: a network is handed all but "x0" as its `cond`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*dims, C)` of the data of a record."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Their type."""
        ...

    @property
    def flip(self) -> bool:
        """Whether a mirrored record is a record as good (faces, photographs) or not (digits, points)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Records: ...


@runtime_checkable
class Dataset(Protocol):
    """What an experiment names: building it reads nothing; `train` and `test` read, and raise UserError by name.

    Where records have a "label" beside "x0", an int32 of one of several classes, it also has `classes`, how many, by which
    networks are made; where they have anything else, `cond`, an example of all that stands beside "x0", as
    `{"label": np.int32(0)}`: its shapes and types are what costs are reckoned with before anything is read.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*dims, C)` of the data of a record."""
        ...

    def train(self) -> Source: ...

    def test(self) -> Source: ...


@runtime_checkable
class OnDisk(Protocol):
    """A data set of files whose shape is known without them."""

    def find(self) -> Path:
        """Where they are, read or not. Raises UserError where they are to be and are not."""
        ...


def x0_and_cond(records: Any) -> tuple[Any, Any]:
    """The data of records, and what conditions them: a dictionary, or None where there is nothing else."""
    if not isinstance(records, Mapping):
        return records, None
    return records[DATA], {name: values for name, values in records.items() if name != DATA} or None


def data_alone(source: Source) -> Source:
    """The same records without what conditions them, as they are compared with samples."""
    if isinstance(source, ArraySource):
        return source if source.cond is None else ArraySource(source.array, source.flip, source.rows, source.stamp)
    return Changed(source, lambda records: x0_and_cond(records)[0])


class Changed:
    """The records of a source, changed as they are read, perhaps to another type."""

    def __init__(self, source: Source, change: Callable[[Any], Records], dtype: np.dtype | None = None):
        self._source, self._change = source, change
        self.shape, self.flip, self.dtype = source.shape, source.flip, source.dtype if dtype is None else dtype

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Records:
        return self._change(self._source[indices])


class ArraySource:
    """Records in memory or in a memory map.

    `array`: data `(N, *dims, C)`, uint8 or float32; or a dictionary of such by the name "x0", and of other arrays with a
    record a row by theirs.
    `flip`: whether training may mirror images left to right.
    `rows`: which of them are the records, in this order; all by default.
    `stamp`: tells versions of a large array apart without reading it.

    Raises UserError for other types, lengths that differ, and images with their channels first, and floating ones (grey
    without a channel too) whose values are those of another range than [-1, 1].

    >>> source = ArraySource({"x0": np.zeros((9, 8, 8, 1), np.uint8), "label": np.arange(9)})
    >>> source[np.array([3, 5])]["label"]
    array([3, 5])
    """

    def __init__(
        self,
        array: Shaped[np.ndarray, "n *shape"] | Mapping[str, Shaped[np.ndarray, "..."]],
        flip: bool = False,
        rows: Int[np.ndarray, " m"] | None = None,
        stamp: str | None = None,
    ):
        if isinstance(array, Mapping) and DATA not in array:
            raise UserError(f"records by name need {DATA!r}, the data, beside {', '.join(array) or 'nothing'}")
        data, cond = x0_and_cond(array)
        self.array: np.ndarray = data
        self.cond = (cond or {}) if isinstance(array, Mapping) else None
        for name, values in (cond or {}).items():
            if values.shape[:1] != data.shape[:1] or values.dtype.kind not in "biuf":
                kind = f"{values.dtype} {values.shape}"
                raise UserError(f"{name!r} must be numbers of each of {len(data)} records, not {kind}")
        if data.ndim < 2 or data.dtype not in (np.uint8, np.float32):
            raise UserError(f"records must be uint8 or float32 (N, *dims, C), not {data.dtype} {data.shape}")
        if data.ndim == 4 and data.shape[-1] not in _CHANNELS and data.shape[1] in _CHANNELS:
            wanted = "images must be (N, H, W, C), not with their channels first: make them so by transpose(0, 2, 3, 1)"
            raise UserError(f"{data.shape}: {wanted}")
        if not is_dark_somewhere(data):
            found = "negative" if data.ndim == 3 else f"below {DARK[4]}"
            raise UserError(f"floating images must lie in [-1, 1], but these are never {found}: {SCALE}")
        self.flip = flip
        self.rows = rows
        self.stamp = stamp

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __len__(self) -> int:
        return len(self.array if self.rows is None else self.rows)

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Records:
        picked = indices if self.rows is None else self.rows[indices]
        if self.cond is None:
            return self.array[picked]
        return {DATA: self.array[picked], **{name: values[picked] for name, values in self.cond.items()}}


def is_dark_somewhere(array: Shaped[np.ndarray, "n *shape"]) -> bool:
    """Whether floating images are, as those in [-1, 1] are, most often among the first few; true of all else."""
    if array.ndim not in DARK or array.dtype == np.uint8 or not array.size:
        return True
    return any(array[begin : begin + _CHUNK].min() < DARK[array.ndim] for begin in range(0, len(array), _CHUNK))


def data_folder(root: str | None) -> Path:
    """The folder of data sets: `root`, which must exist, else $GDDIM_DATA, which must too, else ~/.cache/gddim."""
    given = root or os.environ.get("GDDIM_DATA")
    if not given:
        return Path.home() / ".cache" / "gddim"
    folder = Path(given).expanduser()
    if not folder.is_dir():
        origin = "data root" if root else "GDDIM_DATA"
        raise UserError(f"{origin} {given} is not a folder: make it, or name the folder that holds the data")
    return folder


def every_nth(n: int, every: int) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """Rows to train on and rows held out: every `every`-th (or the last, of fewer); 0 holds out none, tests on all."""
    if every < 0 or every == 1:
        raise UserError(f"test_every must be 0 or at least 2, not {every}")
    rows = np.arange(n)
    if every == 0:
        return rows, rows
    if n < 2:
        raise UserError(f"there is nothing to hold out of {n} records: test_every must be 0")
    held_out = rows % every == min(every, n) - 1
    return rows[~held_out], rows[held_out]


@dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten 8×8 digits that scikit-learn carries: 1,500 to train, 297 held out.

    A digit has 17 grey levels v = 0 … 16, stored as x = `round(255 v / 16)`: levels stay distinct
    (v = `round(16 x / 255)`), and 0 and 16 are exactly -1 and 1 on the device. The split is
    `numpy.random.default_rng(0).permutation(1797)`, because scikit-learn's own order would hold out other
    writers than those trained on.
    """

    labels: bool = field(default=False, metadata=LATER)
    """Whether records have their classes beside them, the digits that they are."""

    shape = (8, 8, 1)

    @property
    def classes(self) -> int:
        return 10 * self.labels

    def train(self) -> ArraySource:
        return self._read(slice(None, 1500))

    def test(self) -> ArraySource:
        return self._read(slice(1500, None))

    def known_classes(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        """Which digit each record of `train` and of `test` is, whether they have labels or not."""
        labels = self._shuffled()[1]
        return labels[:1500], labels[1500:]

    def _read(self, rows: slice) -> ArraySource:
        images, labels = self._shuffled()
        return ArraySource({DATA: images[rows], LABEL: labels[rows].astype(np.int32)} if self.labels else images[rows])

    def _shuffled(self) -> tuple[np.ndarray, np.ndarray]:
        with from_extra("train"):
            from sklearn.datasets import load_digits

        levels, labels = load_digits(return_X_y=True)
        images = np.round(levels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        order = np.random.default_rng(0).permutation(len(images))
        return images[order], labels[order]


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
    labels: bool = field(default=False, metadata=LATER)
    """Whether points have their classes beside them, the circles that they are on."""

    shape = (2,)

    def __post_init__(self) -> None:
        for name, least in {"train_points": 1, "test_points": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def classes(self) -> int:
        return 5 * self.labels

    def train(self) -> ArraySource:
        return self._draw(self.train_points, 0)

    def test(self) -> ArraySource:
        return self._draw(self.test_points, 1)

    def _draw(self, count: int, stream: int) -> ArraySource:
        w, h = 3.5, 1.5
        centres = np.array([(-w, h), (0, h), (w, h), (-0.6 * w, -h), (0.6 * w, -h)]) / 2
        rng = np.random.default_rng([self.seed, stream])
        circle = rng.integers(len(centres), size=count)
        angle = rng.uniform(0, 2 * np.pi, count)
        points = centres[circle] + np.stack([np.cos(angle), np.sin(angle)], axis=1)
        points = ((points - centres.mean(0)) / np.sqrt(centres.var(0) + 0.5)).astype(np.float32)
        return ArraySource({DATA: points, LABEL: circle.astype(np.int32)} if self.labels else points)
