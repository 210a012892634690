"""A NumPy file as a data set."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Shaped

from gddim.data.labels import class_numbers
from gddim.data.sources import DATA, LABEL, SCALE, ArraySource, every_nth, is_dark_somewhere
from gddim.errors import UserError
from gddim.settings import LATER, MAY_CHANGE

_LABELS = ("labels", "train_labels", "test_labels")
_LARGE = 2**30  # bytes of a file that is not read at every start to see whether it is the same


@dataclass(frozen=True)
class ArrayFile:
    """A `.npy` file, or a `.npz` file with one array, with `train` and `test`, or as other programs write samples.

    These have `arr_0`, or `samples`. Beside records there may be whole numbers of their classes: `labels`, or `train_labels`
    and `test_labels`, or `arr_1`. Images are uint8 `(N, H, W, C)`, or floating in
    [-1, 1]; points are floating `(N, C)`. A uint8 or float32 `.npy` is mapped, not read, and may be larger than memory.
    """

    path: str = field(metadata=MAY_CHANGE)
    """The file."""
    flip: bool = False
    """Whether training may mirror images left to right."""
    test_every: int = 10
    """Of the records in order every n-th is held out; 0 holds out none, and tests on all. Unused if `test` exists."""
    labels: bool = field(default=False, metadata=LATER)
    """Whether records have their classes beside them."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.train().shape

    @property
    def classes(self) -> int:
        """How many, up to the largest label; 0 without."""
        if not self.labels:
            return 0
        return 1 + max(int(self._labels(name).max(initial=0)) for name in self._load()[0])

    def train(self) -> ArraySource:
        return self._read("train")

    def test(self) -> ArraySource:
        return self._read("test")

    def _stat(self) -> os.stat_result:
        try:
            return Path(self.path).expanduser().stat()
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror}): a .npy or .npz file is needed") from error

    def _load(self) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        status = self._stat()
        return _load(Path(self.path).expanduser(), (status.st_mtime_ns, status.st_size))

    def _labels(self, name: str) -> Int32[np.ndarray, " n"]:
        """Those of the records of this name. Raises UserError where they are missing or none."""
        arrays, labels = self._load()
        wanted = f"{name}_labels" if name else "labels"
        if wanted not in labels:
            raise UserError(f"{self.path} has no labels: they are an array {wanted} of a .npz file, one of each record")
        return class_numbers(labels[wanted], len(arrays[name]), self.path)

    def _read(self, part: str) -> ArraySource:
        status, arrays = self._stat(), self._load()[0]
        name = part if len(arrays) > 1 else ""
        array = arrays[name]
        if self.flip and array.ndim != 4:
            raise UserError(f"{self.path} holds records {array.shape[1:]}: only images (H, W, C) can be mirrored")
        rows = None if name else every_nth(len(array), self.test_every)[part == "test"]
        large = status.st_size > _LARGE
        stamp = f"{status.st_size} {status.st_mtime_ns} {self.test_every} {part}" + " labels" * self.labels
        found = {DATA: array, LABEL: self._labels(name)} if self.labels else array
        try:
            return ArraySource(found, self.flip, rows, stamp if large else None)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error


@functools.lru_cache(maxsize=1)  # an experiment asks for the shape of its data again and again
def _load(path: Path, stamp: tuple[int, int]) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """The records of a file, `train` and `test` or all as "", checked and floats as float32; and labels, whatever they are.
    `stamp` tells versions of the file apart."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}
    except Exception as error:  # zip, zlib, header and object errors alike
        raise UserError(f"cannot read {path} ({error}): a .npy or .npz file of numbers is needed") from error
    labels = {name: arrays.pop(name) for name in _LABELS if name in arrays and len(arrays) > 1}
    if len(arrays) != 1 and not {"train", "test"} <= set(arrays):
        samples = [array for name, array in arrays.items() if name == "samples" or name.startswith("arr_")]
        if not samples or sum(array.ndim > 1 for array in samples) > 1:
            raise UserError(f"{path} has arrays {', '.join(arrays) or 'none'}: keep one, or name two train and test")
        least, most = min(samples, key=np.ndim), max(samples, key=np.ndim)  # labels have fewer axes
        arrays, labels = {"": most}, labels or ({"labels": least} if least.ndim == 1 else {})
    arrays = {"": next(iter(arrays.values()))} if len(arrays) == 1 else arrays
    arrays = {name: _checked(path, array) for name, array in arrays.items()}
    if len(arrays) > 1 and (train := arrays["train"].shape[1:]) != (test := arrays["test"].shape[1:]):
        raise UserError(f"{path} has records {train} in train and {test} in test: both must be of one shape")
    return arrays, labels


def _checked(path: Path, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "n *shape"]:
    flat = array.ndim == 3 and array.dtype == np.uint8
    if array.ndim < 2 or flat or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        kinds = "images (N, H, W, C) or points (N, C), uint8 or floating"
        grey = f"; of grey images make it {(*array.shape, 1)}" if flat else ""
        raise UserError(f"{path} must hold {kinds}, not {array.dtype} {array.shape}{grey}")
    if array.dtype == np.uint8:
        return array
    array = array.astype(np.float32, copy=False)
    low, high = (array.min(), array.max()) if array.size else (-1, 1)
    if not np.isfinite(low + high):
        raise UserError(f"{path} holds values that are not finite")
    if not is_dark_somewhere(array) or (array.ndim == 4 and not -1 <= low <= high <= 1):
        grey = f", and make it {(*array.shape, 1)}" if array.ndim == 3 else ""
        raise UserError(f"{path}: floating images must lie in [-1, 1], found {low:g} to {high:g}: {SCALE}{grey}")
    return array
