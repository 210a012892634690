"""Tensors out of a PyTorch checkpoint without PyTorch, and without running what the file asks for.

A checkpoint is a pickle that describes tensors, and their bytes beside it. The pickle is walked opcode by opcode: only
those that build numbers, strings and containers are known, and the only calls are the three that describe a tensor.
Anything else in the file is an error, not an instruction.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gddim.errors import UserError

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
}
_CALLS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict")
_MAGIC = 0x1950A86A20F9469CFC6C  # first value of a checkpoint from before PyTorch 1.6
_MARK = object()


class _Name(NamedTuple):
    """A class or function that the file names; never imported."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.dtype.itemsize


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, values: np.ndarray) -> np.ndarray:
        """The tensor's own copy out of its storage's values."""
        size = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if min((self.offset, *self.shape, *self.strides)) < 0 or size > len(values) or (size and last >= len(values)):
            raise UserError(f"a tensor of shape {self.shape} reaches outside its storage of {len(values)} values")
        strides = [step * values.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides).copy()


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The named tensors of a `torch.save`d state dictionary, zip form or older. Raises `UserError` for all else."""
    if not path.is_file():
        raise UserError(f"{path} is no file: a PyTorch checkpoint is expected there")
    try:
        with path.open("rb") as file:
            tensors, values = _read_zip(file) if zipfile.is_zipfile(path) else _read_stream(file)
            return {name: tensor.of(values[tensor.storage.key]) for name, tensor in tensors.items()}
    except Exception as error:  # a file that anyone may have made fails in ways that no list names
        raise UserError(f"{path} is no PyTorch checkpoint of plain tensors: {error}") from error


def _read_zip(file: io.BufferedIOBase) -> tuple[dict[str, _Tensor], dict[str, np.ndarray]]:
    with zipfile.ZipFile(file) as archive:
        (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = index.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise UserError("its numbers are big-endian")
        tensors = _tensors(_walk(io.BytesIO(archive.read(index))))
        values = {}
        for storage in {tensor.storage for tensor in tensors.values()}:
            member = archive.getinfo(f"{root}data/{storage.key}")
            if member.file_size != storage.size:
                raise UserError(f"storage {storage.key} has {member.file_size} bytes, not {storage.size}")
            values[storage.key] = np.frombuffer(archive.read(member), storage.dtype)
    return tensors, values


def _read_stream(file: io.BufferedIOBase) -> tuple[dict[str, _Tensor], dict[str, np.ndarray]]:
    """The form before PyTorch 1.6: five pickles, then the storages in the order of the fifth, each after its length."""
    if _walk(file) != _MAGIC:
        raise UserError("neither a zip archive nor PyTorch's older form")
    _walk(file)
    if not _walk(file)["little_endian"]:
        raise UserError("its numbers are big-endian")
    tensors = _tensors(_walk(file))
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    values = {}
    for key in _walk(file):
        if int.from_bytes(file.read(8), "little") != storages[key].count:
            raise UserError(f"storage {key} does not have the length that its tensors name")
        raw = file.read(storages[key].size)
        if len(raw) != storages[key].size:
            raise UserError(f"storage {key} ends after {len(raw)} bytes of {storages[key].size}")
        values[key] = np.frombuffer(raw, storages[key].dtype)
    return tensors, values


def _tensors(tree: Any) -> dict[str, _Tensor]:
    if not isinstance(tree, dict) or not all(isinstance(tensor, _Tensor) for tensor in tree.values()):
        raise UserError("it holds something other than named tensors")
    return tree


def _walk(file: io.BufferedIOBase) -> Any:
    """The value of one pickle, made of dictionaries, lists, tuples, numbers, strings, `_Name`s and `_Tensor`s."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is _MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    opcodes: Iterator[Any] = pickletools.genops(file)  # pyright: ignore[reportArgumentType]
    for opcode, argument, position in opcodes:
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_Name(argument))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "BUILD":
                stack.pop()  # attributes of the dictionary itself: version numbers of its modules
            case other:
                raise UserError(f"opcode {other} at byte {position} is not one that tensors need")
    raise UserError("the pickle has no end")


def _call(function: Any, arguments: tuple) -> Any:
    handlers: dict[str, Callable] = dict(zip(_CALLS, (_tensor, lambda data, *_: data, dict), strict=True))
    if not isinstance(function, _Name) or function.name not in handlers:
        raise UserError(f"it calls {getattr(function, 'name', function)}, which no tensor needs")
    return handlers[function.name](*arguments)


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _storage(kind: str, dtype: _Name, key: str, location: str, count: int, view: None = None) -> _Storage:
    name = dtype.name.removeprefix("torch ")
    if kind != "storage" or name not in _DTYPES or view is not None:
        raise UserError(f"storage {key} is of kind {kind} {name}; known are {', '.join(_DTYPES)}")
    return _Storage(key, _DTYPES[name], count)
