"""The safetensors format: eight bytes with the length of a JSON header, the header, then the numbers of each array."""

import json
import math
from collections.abc import Mapping
from typing import IO

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from gddim.errors import UserError

DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
}  # fmt: skip
HEADER_LIMIT = 3 * 2**22  # which holds a spectrum of 1024 × 1024 frequencies
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(arrays: Mapping[str, Shaped[np.ndarray, "..."]], metadata: Mapping[str, str]) -> bytes:
    """The file, the same bytes for the same arrays, each aligned to its type. Raises `UserError` for a long header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    order, end = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)), 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        dtype = _NAMES[arrays[name].dtype]
        header[name] = {"dtype": dtype, "shape": arrays[name].shape, "data_offsets": (begin, end)}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    if len(words) > HEADER_LIMIT:
        raise UserError(f"what is told beside the arrays takes {len(words):,} bytes: accepted are {HEADER_LIMIT:,}")
    return b"".join([len(words).to_bytes(8, "little"), words, *(arrays[name].tobytes() for name in order)])


def metadata(file: IO[bytes]) -> dict[str, str]:
    """What a file tells beside its arrays, of which none is read. Raises `UserError` for a long header and what JSON does."""
    if (length := int.from_bytes(file.read(8), "little")) > HEADER_LIMIT:
        raise UserError(f"it has a header of {length} bytes")
    return json.loads(file.read(length))["__metadata__"]


def parse(
    content: bytes | memoryview, limit: int = HEADER_LIMIT
) -> tuple[dict[str, Shaped[np.ndarray, "..."]], dict[str, str]]:
    """The arrays of a file, which are no copies, and its metadata.

    `limit`: of the header, in bytes, of which Python makes thirty times as many.

    Raises `UserError` for arrays that are not within the file, and whatever JSON raises for another.
    """
    length, total = int.from_bytes(content[:8], "little"), len(content)
    if not 2 <= length <= min(total - 8, limit):
        raise UserError(f"it has a header of {length} bytes, and {total} in all")
    header, found, taken = json.loads(bytes(content[8 : 8 + length])), {}, 0
    metadata = header.pop("__metadata__", {})
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in DTYPES or any(type(n) is not int or not 0 <= n < 2**40 for n in (begin, end, *shape)):
            raise UserError(f"{name:.60} is no array of {', '.join(DTYPES)}")
        taken += end - begin
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize or 8 + length + end > total or taken > total:
            raise UserError(f"{name:.60} is not where the file says that it is")
        found[name] = np.frombuffer(content[8 + length + begin : 8 + length + end], DTYPES[dtype]).reshape(shape)
    return found, metadata
