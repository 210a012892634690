"""Tensors out of a PyTorch checkpoint without PyTorch, and without running what the file asks for.

A checkpoint is a pickle that describes tensors, read as data (see `gddim.pickles`), and their bytes beside it or within.
"""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gddim.errors import UserError
from gddim.pickles import Calls, Name, Thing, unpickle
from gddim.storage import mapped

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_MAGIC = 0x1950A86A20F9469CFC6C  # first value of a checkpoint from before PyTorch 1.6, and of a storage within a pickle


LEAST = 2**12


class Window:
    """Bytes, read as those of a file are; what is long is no copy."""

    def __init__(self, content: bytes | memoryview):
        self._content, self._at = memoryview(content), 0

    def read(self, count: int) -> bytes | memoryview:
        found = self._content[self._at : self._at + count]
        self._at += len(found)
        return bytes(found) if len(found) < LEAST else found

    def readline(self) -> bytes:
        """Up to the end of a line, or of the longest that a name can be."""
        line = bytes(self._content[self._at : self._at + LEAST])
        line = line[: line.find(b"\n") + 1 or None]
        self._at += len(line)
        return line

    def tell(self) -> int:
        return self._at

    def part(self, count: int) -> memoryview:
        """What comes next, without a look at it."""
        self._at += count
        return self._content[self._at - count : self._at]


class Storage:
    """Numbers of one type, found when asked for."""

    def __init__(self, key: str, dtype: np.dtype, count: int):
        self.key, self.dtype, self.count = key, dtype, count
        self.find: Callable[[Storage], np.ndarray] | None = None
        self._values: np.ndarray | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.dtype.itemsize

    def values(self) -> np.ndarray:
        if self._values is None:
            if self.find is None:
                raise UserError(f"storage {self.key:.40} is not in the file")
            self._values = self.find(self)
        return self._values


class Tensor:
    """A view of a storage."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any):
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 8:
            raise UserError("a tensor is not described as PyTorch does")
        if any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
            raise UserError("a tensor has a shape, stride or offset that none can have")
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)
        size = math.prod(self.shape)
        last = offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if size > storage.count or (size and last >= storage.count):
            raise UserError(f"a tensor of shape {self.shape} reaches outside its storage of {storage.count} values")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def array(self) -> np.ndarray:
        """Read-only, and not a copy."""
        values = self.storage.values()
        strides = [step * values.itemsize for step in self.strides]
        start = values[self.offset :] if math.prod(self.shape) else values[:0]
        return np.lib.stride_tricks.as_strided(start, self.shape, strides, writeable=False)


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The named tensors of a `torch.save`d state dictionary, zip form or older. Raises `UserError` for all else."""
    if not path.is_file():
        raise UserError(f"{path} is no file: a PyTorch checkpoint is expected there")
    with refusing(path, "PyTorch checkpoint of plain tensors"), path.open("rb") as file:
        return arrays(torch_tree(file), os.fstat(file.fileno()).st_size)


@contextlib.contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
    """What anyone may have made, whose reading fails in ways that no list names: each is one `UserError`, in one line."""
    try:
        yield
    except Exception as error:
        plain = isinstance(error, UserError | OSError)
        said = " ".join((str(error) if plain else f"{type(error).__name__} {error}").split())[:300]
        raise UserError(f"{path} is no {kind}, or not all of it: {said}") from error


def arrays(tree: Any, size: int) -> dict[str, np.ndarray]:
    """The arrays of named tensors, which together are no more than the `size` of their file."""
    if not isinstance(tree, dict) or not all(isinstance(tensor, Tensor) for tensor in tree.values()):
        raise UserError("it holds something other than named tensors")
    if sum(tensor.nbytes for tensor in tree.values()) > size:
        raise UserError("its tensors are more than the file holds")
    return {str(name): tensor.array() for name, tensor in tree.items()}


def torch_tree(file: io.BufferedReader, calls: Calls | None = None) -> Any:
    """What `torch.save` wrote, its tensors as `Tensor`; `calls` as in `unpickle`, beside those that make tensors."""
    size, known = os.fstat(file.fileno()).st_size, {**CALLS, **(calls or {})}
    if not zipfile.is_zipfile(file):
        return _read_stream(Window(mapped(Path(file.name))), known, size)
    archive = zipfile.ZipFile(file)  # open as long as the file is
    members = {member.filename: member for member in archive.infolist()}
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members.values())
    if not stored or sum(member.file_size for member in members.values()) > size:
        raise UserError("its members are compressed, or claim more than the file holds")
    (index,) = [name for name in members if name.endswith("/data.pkl")]
    root = index.removesuffix("data.pkl")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise UserError("its numbers are big-endian")

    return unpickle(Window(archive.read(index)), known, size, _Storages({}, partial(_member, archive, root)))


def _member(archive: zipfile.ZipFile, root: str, storage: Storage) -> np.ndarray:
    member = archive.getinfo(f"{root}data/{storage.key}")
    if member.file_size != storage.size:
        raise UserError(f"storage {storage.key:.40} has {member.file_size} bytes, not {storage.size}")
    return np.frombuffer(archive.read(member), storage.dtype)


def _read_stream(file: Window, calls: Calls, size: int) -> Any:
    """The form before PyTorch 1.6: five pickles, then the storages in the order of the fifth, each after its length."""
    if unpickle(file, {}, size) != _MAGIC:
        raise UserError("neither a zip archive nor PyTorch's older form")
    unpickle(file, {}, size)
    if not unpickle(file, {}, size)["little_endian"]:
        raise UserError("its numbers are big-endian")
    storages: dict[str, Storage] = {}
    tree = unpickle(file, calls, size, _Storages(storages, None))
    for key in unpickle(file, {}, size):
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or int.from_bytes(file.read(8), "little") != storage.count:
            raise UserError("a storage does not have the length that its tensors name")
        start = file.tell()
        if start + storage.size > size:
            raise UserError(f"storage {key:.40} ends after {size - start} bytes of {storage.size}")
        storage.find = partial(_numbers, file.part(storage.size))
    return tree


def _numbers(raw: memoryview, storage: Storage) -> np.ndarray:
    return np.frombuffer(raw, storage.dtype, storage.count)


class _Storages(NamedTuple):
    """What a file refers to: its storages, collected by their keys."""

    found: dict[str, Storage]
    find: Callable[[Storage], np.ndarray] | None

    def __call__(self, kind: Any, dtype: Any, key: Any, location: Any, count: Any, view: Any = None) -> Storage:
        name = dtype.name.removeprefix("torch ") if isinstance(dtype, Name) else "unknown"
        if kind != "storage" or name not in _DTYPES or view is not None or not isinstance(key, str):
            raise UserError(f"a storage is of type {name:.40}; known are {', '.join(_DTYPES)}")
        if type(count) is not int or not 0 <= count < 2**40:
            raise UserError(f"storage {key:.40} has a length that none can have")
        made = self.found.setdefault(key, Storage(key, _DTYPES[name], count))
        if (made.dtype, made.count) != (_DTYPES[name], count):
            raise UserError(f"storage {key:.40} is described in two ways")
        made.find = self.find
        return made


def _nested(content: Any) -> Storage:
    """A storage that was pickled as the bytes of a file of its own."""
    if not isinstance(content, bytes | memoryview):
        raise UserError("a storage within the pickle is not bytes")
    storage = _read_stream(Window(content), {}, len(content))
    if not isinstance(storage, Storage):
        raise UserError("a storage within the pickle is something else")
    return storage


def _number(dtype: Any, content: Any) -> float | int:
    """A NumPy scalar."""
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise UserError("a NumPy number is not described as NumPy does")
    return np.frombuffer(content, dtype)[0].item()


def _dtype(code: Any, *_: Any) -> np.dtype:
    if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise UserError("a NumPy number is of a type that is no number's")
    return np.dtype(code).newbyteorder("<")


def _encoded(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise UserError("bytes are not described as Python's second protocol does")
    return text.encode("latin1")


def _size(sizes: Any) -> tuple[Any, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > 8:
        raise UserError("a size is not that of a tensor")
    return tuple(sizes)


def empty() -> dict[Any, Any]:
    """A dictionary, to be filled by opcodes, which check its keys."""
    return {}


CALLS: Calls = {
    "torch._utils _rebuild_tensor_v2": Tensor,
    "torch._utils _rebuild_tensor": Tensor,
    "torch._utils _rebuild_parameter": lambda data, *_: data,
    "torch.storage _load_from_bytes": _nested,
    "torch Size": _size,
    "torch device": lambda *_: Thing("torch device"),
    "collections OrderedDict": empty,
    "numpy dtype": _dtype,
    "numpy.core.multiarray scalar": _number,
    "numpy._core.multiarray scalar": _number,
    "_codecs encode": _encoded,
}
