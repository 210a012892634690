"""CIFAR-10 and SVHN as their authors publish them, checked against md5 sums; archives are read, not unpacked."""

import hashlib
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int32, UInt8

from gddim.data.files import digest, fetch
from gddim.data.sources import DATA, LABEL, ArraySource, data_folder
from gddim.errors import UserError
from gddim.settings import LATER, MAY_CHANGE

_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_BATCH_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_BATCH_BYTES = 10_000 * 3073
_SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
_SVHN_MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


@dataclass(frozen=True)
class CIFAR10:
    """CIFAR-10 (Krizhevsky 2009): 50,000 photographs to train and 10,000 to test, 32×32×3, from the binary version.

    Uses the folder `cifar-10-batches-bin` or the archive `cifar-10-binary.tar.gz` in `root`, and downloads the archive
    where there is neither. The python version is refused: it is pickled, and loading a pickle can run code.
    """

    root: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder that holds the data; by default $GDDIM_DATA, or ~/.cache/gddim."""
    batches: tuple[int, ...] = ()
    """Which of its files 1 to 5, of 10,000 photographs each, to train on, where not all are there; none named: all."""
    labels: bool = field(default=False, metadata=LATER)
    """Whether records have their classes beside them: 0 airplane, automobile, bird, cat, deer, dog, frog, horse, ship,
    9 truck."""

    shape = (32, 32, 3)

    @property
    def classes(self) -> int:
        return 10 * self.labels

    def __post_init__(self):
        if len({*self.batches} & {*range(1, 6)}) < len(self.batches):
            raise UserError(f"batches must be different numbers from 1 to 5, not {self.batches}")

    def find(self) -> Path:
        return data_folder(self.root)  # what it lacks is downloaded

    def train(self) -> ArraySource:
        return self._read([f"data_batch_{number}.bin" for number in self.batches or range(1, 6)])

    def test(self) -> ArraySource:
        return self._read(["test_batch.bin"])

    def _read(self, names: list[str]) -> ArraySource:
        folder = self.find()
        unpacked = folder / "cifar-10-batches-bin"
        if not unpacked.is_dir() and any((folder / name).exists() for name in _BATCH_MD5):
            unpacked = folder
        batches = _from_folder(unpacked, names) if unpacked.is_dir() else _from_archive(folder, names)
        read = [_records(folder, name, batches[name]) for name in names]
        images, labels = map(np.concatenate, zip(*read, strict=True))
        return ArraySource({DATA: images, LABEL: labels} if self.labels else images, flip=True)


def _from_folder(folder: Path, names: list[str]) -> dict[str, bytes]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}: unpack {_CIFAR_URL} there again")
    return {name: (folder / name).read_bytes() for name in names}


def _from_archive(folder: Path, names: list[str]) -> dict[str, bytes]:
    archive = folder / PurePosixPath(_CIFAR_URL).name
    if not archive.exists():
        for pickled in ("cifar-10-batches-py", "cifar-10-python.tar.gz"):
            if (folder / pickled).exists():
                raise UserError(f"{folder / pickled} is pickled, which can run code: put {_CIFAR_URL} beside it")
        fetch(_CIFAR_URL, archive, _CIFAR_MD5)
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in names and member.isfile() and (file := tar.extractfile(member)):
                    found[name] = file.read(_BATCH_BYTES + 1)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise UserError(f"{archive} is damaged ({reason}): delete it, and it is downloaded again") from error
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{archive} lacks {', '.join(missing)}: delete it, and it is downloaded again")
    return found


def _records(folder: Path, name: str, raw: bytes) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int32[np.ndarray, " n"]]:
    """Images and labels of one batch file: records of a label byte and three planes of 32×32 bytes."""
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != _BATCH_MD5[name]:
        raise UserError(
            f"CIFAR-10 in {folder}: {name} is damaged: {len(raw)} bytes with md5 {found}, not {_BATCH_MD5[name]}"
        )
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    planes = rows[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), rows[:, 0].astype(np.int32)


@dataclass(frozen=True)
class SVHN:
    """Street View House Numbers, cropped (Netzer et al. 2011): 73,257 digits to train and 26,032 to test, 32×32×3.

    Uses `train_32x32.mat` and `test_32x32.mat` in `root`, and downloads the one that is missing.
    """

    root: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder that holds the data; by default $GDDIM_DATA, or ~/.cache/gddim."""
    labels: bool = field(default=False, metadata=LATER)
    """Whether records have their classes beside them, the digits that they are."""

    shape = (32, 32, 3)

    @property
    def classes(self) -> int:
        return 10 * self.labels

    def find(self) -> Path:
        return data_folder(self.root)  # what it lacks is downloaded

    def train(self) -> ArraySource:
        return self._read("train_32x32.mat")

    def test(self) -> ArraySource:
        return self._read("test_32x32.mat")

    def _read(self, name: str) -> ArraySource:
        from scipy.io import loadmat

        path = self.find() / name
        if not path.exists():
            fetch(_SVHN_URL + name, path, _SVHN_MD5[name])
        if (found := digest(path, "md5")) != _SVHN_MD5[name]:
            raise UserError(f"SVHN: {path} is damaged: its md5 is {found}, not {_SVHN_MD5[name]}")
        found = loadmat(path, variable_names=["X", "y"])
        images = np.ascontiguousarray(found["X"].transpose(3, 0, 1, 2))
        if not self.labels:
            return ArraySource(images)
        return ArraySource({DATA: images, LABEL: found["y"].ravel().astype(np.int32) % 10})  # 10 stands for 0 there
