"""A program: readers of checkpoints against mutations of a file, without the checks of types that tests run under, which
take most of the time.

    python fuzz.py FILE COUNT SEED      EDM's .pkl, a .pth, flax's .msgpack, a .safetensors of ours, or diffusers' in its folder

Every mutation must be read, or refused in one line. Prints how many were refused, and by how many bytes the memory grew.
"""

import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from etils import epath

from gddim import load, weights
from gddim.convert.flax import assign, read_state
from gddim.convert.recognition import parse
from gddim.errors import UserError
from gddim.nn import NCSNppConfig


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


def published(path: Path, build: bool) -> None:
    found = parse(path)
    if build:  # which takes a second
        found.model  # noqa: B018


def flax(path: Path, build: bool) -> None:
    state = read_state(path)
    if build:
        plain = {"embedding": "positional", "fir": False, "progressive_input": "none"}
        told, channels = ({}, 6) if "fourier" in path.name else (plain, 3)
        config = NCSNppConfig(width=16, blocks=1, **told)  # pyright: ignore[reportArgumentType]
        shapes = eqx.filter_eval_shape(config.build, (32, 32, channels), channels, jax.random.key(0))
        assign(state, shapes, "ema", path)


def ours(path: Path, build: bool) -> None:
    load(path) if build else weights.read(epath.Path(path))


def refused(path: Path, build: bool) -> bool:
    kinds = {".msgpack": flax, ".safetensors": ours}
    folder = path.parent if path.name == "diffusion_pytorch_model.safetensors" else path
    read = published if folder != path else kinds.get(path.suffix, published)
    try:
        read(folder, build)
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
        if source.name == "diffusion_pytorch_model.safetensors":
            shutil.copytree(source.parent, folder, dirs_exist_ok=True)
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
