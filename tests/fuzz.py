"""A program: readers of checkpoints against mutations of a file, without the checks of types that tests run under, which
take most of the time.

    python fuzz.py FILE COUNT SEED

Every mutation must be read, or refused in one line. Prints how many were refused, and by how many bytes the memory grew.
"""

import os
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

from gddim.convert.recognition import parse
from gddim.errors import UserError


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, cut out, doubled, or swapped; or the end is missing."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            break
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
        match int(rng.integers(6)):
            case 0:
                data[at] = int(rng.integers(256))
            case 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = rng.bytes(length)
            case _:
                del data[at:]
    return bytes(data)


def refused(path: Path, build: bool) -> bool:
    try:
        found = parse(path)
        if build:  # which takes a second
            found.model  # noqa: B018
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("not one line") from error
        return True
    return False


def forbidden(*arguments: object, **options: object) -> None:
    raise AssertionError("a file was obeyed")


def main() -> None:
    source, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    content, rng, refusals = source.read_bytes(), np.random.default_rng(seed), 0
    for name in ("system", "popen", "execv"):
        setattr(os, name, forbidden)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / source.name
        path.write_bytes(content)
        refused(path, build=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(count):
            path.write_bytes(mutated(content, rng))
            refusals += refused(path, build=i % 100 == 0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(refusals, 1024 * grown)


if __name__ == "__main__":
    main()
