"""Parameters, their averages and Adam's moments in three to six bytes a parameter, in a few small files.

All trees of a state are of one shape, and each is a vector of its leaves one after another, kept in one of these ways:

    whole       float16: a rounding of 2⁻¹² of a parameter, far less than what one step of Adam changes
    near        8 bits of the difference to the vector that is kept whole, as it is read: 1/254 of the largest of each 128
    signed      8 bits, likewise
    positive    8 bits of the logarithm, over the range of each 128, but at most 10¹²; 0 becomes the least of them

What is drawn once and never trained is kept in full in the metadata, where the vector is of parameters (`is_fixed`).

A folder holds `1-of-3.safetensors`, …: each a slice of every vector, of at most `PART_BYTES`, with a digest. The metadata of
each tell the step, the leaves, the configuration of the run.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32, Shaped

from gddim import safetensors
from gddim.errors import UserError
from gddim.storage import all_or_none, write_whole

PART_BYTES = 16_000_000
BLOCK = 128
FLOOR = 1e-12
FORMAT = "gddim state 1"
_NAME = re.compile(r"(\d+)-of-(\d+)\.safetensors")

Vector = Float32[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A state as vectors by name, each with the way in which it is kept, one of them whole."""

    step: int
    leaves: list[tuple[str, tuple[int, ...]]]
    """Path and shape of each leaf, in the order of the vectors."""
    vectors: dict[str, Vector]
    ways: dict[str, str]
    about: dict[str, Any]
    """What else JSON can hold."""

    def tree(self, name: str) -> dict[str, Float32[np.ndarray, "..."]]:
        """The leaves of a vector by their paths, which are no copies."""
        ends = np.cumsum([math.prod(shape) for _, shape in self.leaves])[:-1]
        parts = np.split(self.vectors[name], ends)
        return {path: part.reshape(shape) for (path, shape), part in zip(self.leaves, parts, strict=True)}


def is_fixed(path: str) -> bool:
    """Whether a leaf is the frequencies of Fourier features: a step of Adam changes none of them, and a rounding that is
    nothing to a weight is radians of their angles, `2π f log(999 t)`."""
    return path.rpartition(".")[2] == "frequencies"


def vector(tree: Mapping[str, Any]) -> Vector:
    """The leaves of a tree, one after another."""
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in tree.values()])


def write(folder: epath.Path, packed: Packed) -> None:
    """Write a state; each file whole or not at all, and all of those that are new, or none."""
    write_parts(folder, encode(packed))


def write_parts(folder: epath.Path, parts: list[bytes]) -> None:
    """Write what `encode` made of a state, likewise."""
    files = [folder / f"{part}-of-{len(parts)}.safetensors" for part in range(1, len(parts) + 1)]
    with all_or_none(*files):
        for file, content in zip(files, parts, strict=True):
            write_whole(file, content)


def encode(packed: Packed) -> list[bytes]:
    """What is in each file of a state."""
    whole = next(name for name, way in packed.ways.items() if way == "whole")
    base = packed.vectors[whole]
    fits = np.abs(base).max(initial=0) < np.finfo(np.float16).max
    arrays = {whole: base.astype(np.float16) if fits else base}
    rounded = arrays[whole].astype(np.float32)
    for name, way in packed.ways.items():
        values = packed.vectors[name]
        if way == "positive":
            arrays |= _logarithm(name, values)
        elif way != "whole":
            arrays |= _linear(name, values - rounded if way == "near" else values)
    near = [packed.tree(name) for name, way in packed.ways.items() if way == "near"]
    still = lambda path, leaf: is_fixed(path) and all(np.allclose(tree[path], leaf, 1e-3) for tree in near)
    fixed = {path: leaf.tolist() for path, leaf in packed.tree(whole).items() if still(path, leaf)}
    about = {"format": FORMAT, "step": packed.step, "leaves": packed.leaves, "ways": packed.ways, "about": packed.about}
    about |= {"fixed": fixed} if fixed else {}
    blocks = -(-base.size // BLOCK)
    each = PART_BYTES - len(json.dumps(about)) * 2 - 4096  # what is quoted may double
    parts = max(1, math.ceil(sum(x.nbytes for x in arrays.values()) / each))
    edges = [blocks * part // parts for part in range(parts + 1)]
    cuts = [{name: x[_slice(name, *edge)] for name, x in arrays.items()} for edge in itertools.pairwise(edges)]
    return [_file(cut, about) for cut in cuts]


def read(folder: epath.Path) -> Packed:
    """The state in a folder. Raises `UserError` unless it is there, whole."""
    files = {found.groups(): path for path in folder.iterdir() if (found := _NAME.fullmatch(path.name))}
    parts = {int(count) for _, count in files}
    if len(parts) != 1 or {int(part) for part, _ in files} != {*range(1, max(parts) + 1)}:
        raise UserError(f"{folder} lacks some of 1-of-N.safetensors … N-of-N.safetensors; it has {sorted(files)}")
    loaded = [_load(path) for _, path in sorted(files.items(), key=lambda item: int(item[0][0]))]
    about = loaded[0][1]
    if any(other != about for _, other in loaded):
        raise UserError(f"{folder}: its files are of several states")
    arrays = {name: np.concatenate([cut[name] for cut, _ in loaded]) for name in loaded[0][0]}
    whole = {name: arrays[name].astype(np.float32) for name, way in about["ways"].items() if way == "whole"}
    (base,) = whole.values()

    def values(name: str, way: str) -> Vector:
        if way == "positive":
            return _exponential(arrays, name)
        linear = arrays[name].astype(np.float32) * np.repeat(arrays[f"{name}:scale"], BLOCK)[: base.size]
        return base + linear if way == "near" else linear

    vectors = {name: whole[name] if way == "whole" else values(name, way) for name, way in about["ways"].items()}
    leaves = [(path, tuple(shape)) for path, shape in about["leaves"]]
    packed = Packed(about["step"], leaves, vectors, about["ways"], about["about"])
    for name, way in packed.ways.items():
        if way in ("whole", "near"):  # the model, and averages of it
            tree = packed.tree(name)
            for path, leaf in about.get("fixed", {}).items():
                tree[path][...] = leaf
    return packed


def peek(folder: epath.Path) -> tuple[int, dict[str, Any]]:
    """The step of the state in a folder, and what else is told of it; no array is read."""
    path = min(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    try:
        with path.open("rb") as file:
            told = json.loads(safetensors.metadata(file)["gddim"])
        return told["step"], told["about"]
    except Exception as error:
        raise UserError(f"{path} is no part of a state: {error!r:.200}") from error


def holds_state(folder: epath.Path) -> bool:
    """Whether a folder is one that `write` made."""
    return folder.is_dir() and any(_NAME.fullmatch(path.name) for path in folder.iterdir())


def _padded(values: Vector) -> Float32[np.ndarray, "blocks 128"]:
    return np.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)


def _linear(name: str, values: Vector) -> dict[str, np.ndarray]:
    blocks = _padded(values)
    scale = np.abs(blocks).max(1) / 127
    codes = np.rint(blocks / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8)
    return {name: codes.ravel()[: values.size], f"{name}:scale": scale}


def _logarithm(name: str, values: Vector) -> dict[str, np.ndarray]:
    """Code c is `top · exp(−(255 − c) range)`."""
    blocks = _padded(values)
    top = blocks.max(1)
    low = np.maximum(np.where(blocks > 0, blocks, np.inf).min(1), FLOOR * top)
    safe = np.where(top > 0, top, 1)
    span = np.where(top > 0, np.log(safe) - np.log(np.where(top > 0, low, 1)), 0).astype(np.float32) / 255
    depth = np.log(safe)[:, None] - np.log(np.maximum(blocks, FLOOR * safe[:, None]))
    codes = 255 - np.clip(np.rint(depth / np.where(span > 0, span, 1)[:, None]), 0, 255)
    return {name: codes.astype(np.uint8).ravel()[: values.size], f"{name}:top": top, f"{name}:span": span}


def _exponential(arrays: dict[str, np.ndarray], name: str) -> Vector:
    codes = arrays[name].astype(np.float32)
    top, span = (np.repeat(arrays[f"{name}:{what}"], BLOCK)[: codes.size] for what in ("top", "span"))
    return top * np.exp(-(255 - codes) * span)


def _slice(name: str, low: int, high: int) -> slice:
    """Of an array with an entry a parameter, or of one with an entry a block."""
    return slice(low, high) if ":" in name else slice(low * BLOCK, high * BLOCK)


def digest_of(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> str:
    """SHA-256 of arrays with their names, types and shapes."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


def _file(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> bytes:
    return safetensors.encode(arrays, {"gddim": json.dumps(about), "sha256": digest_of(arrays)})


def _load(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        arrays, head = safetensors.parse(path.read_bytes())
        about, digest = json.loads(head["gddim"]), head["sha256"]
        intact = about["format"] == FORMAT and digest == digest_of(arrays)
    except Exception as error:  # whatever JSON and the disk make of bytes that are not theirs
        raise UserError(f"{path} is no part of a state: {error!r:.200}") from error
    if not intact:
        raise UserError(f"{path} is damaged: its bytes are not those that were written")
    return arrays, about
