"""What records are by their content: neither where they lie nor whether as files, archive, array or shards is a part."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gddim.data.sources import Records, Source
from gddim.errors import progress

_CHUNK = 1024
_BYTES = 16


def identity(source: Source, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Count, shape, dtype and digest of the records in their order, and whether they may be mirrored; as JSON.

    A source too large to be read at every start has a `stamp` (sizes and times of its files): where it is that of
    `known`, an earlier identity, its digest is so too, unread.
    """
    stamp = getattr(source, "stamp", None)
    facts = {"count": len(source), "shape": list(source.shape), "dtype": source.dtype.name, "flip": source.flip}
    if stamp and known and known.get("stamp") == stamp:
        return facts | {"digest": known["digest"], "stamp": stamp}
    found = getattr(source, "digest", None) or hexadecimal(_digest(source))
    return facts | {"digest": found} | ({"stamp": stamp} if stamp else {})


def _digest(source: Source) -> int:
    rows = range(0, len(source), _CHUNK)
    if len(rows) > 64:
        rows = progress(rows, "reading the records", unit_scale=_CHUNK, unit=" records")
    return sum(digest_of(source[np.arange(begin, min(begin + _CHUNK, len(source)))], begin) for begin in rows)


def digest_of(records: Records, begin: int) -> int:
    """`Σ_i BLAKE2b(record i, salt i)` over records `begin`, `begin + 1`, …: the digests of parts add up to that of all."""
    return sum(
        int.from_bytes(hashlib.blake2b(record, digest_size=_BYTES, salt=number.to_bytes(_BYTES)).digest())
        for number, record in enumerate(_bytes(records), begin)
    )


def _bytes(records: Records) -> Iterable[bytes]:
    """Of each record; where it is a dictionary, of each array after its name, type and shape."""
    if not isinstance(records, Mapping):
        return (record.tobytes() for record in records)
    heads = [f"{name} {values.dtype} {values.shape[1:]} ".encode() for name, values in sorted(records.items())]
    rows = zip(*(values for _, values in sorted(records.items())), strict=True)
    return (b"".join(head + part.tobytes() for head, part in zip(heads, row, strict=True)) for row in rows)


def hexadecimal(digest: int) -> str:
    """A digest, or a sum of such, in hexadecimal."""
    return f"{digest % 2 ** (8 * _BYTES):0{2 * _BYTES}x}"
