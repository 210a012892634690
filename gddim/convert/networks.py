"""Where each parameter of an NCSN++ of ours is in the networks that others published."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gddim.errors import UserError
from gddim.nn import NCSNpp
from gddim.storage import let_go

M = TypeVar("M")
SHOWN = 20  # parameters of a checkpoint that does not fit
Names = list[dict[str, tuple[int, ...]]]
"""For each of our parameters, in the tree's order, those that are stacked in it by their published names, with shapes."""


class Part(NamedTuple):
    """A block, or a layer outside of the blocks, in the order of the calls."""

    place: str
    """Prefix of its parameters' paths in our tree."""
    index: int
    """Its place in a run of stacked blocks."""
    side: Literal["top", "down", "middle", "up", "end"]
    level: int
    """Of the resolution, 0 the finest; a resampling part belongs to that which it comes from."""
    number: int
    """Its place among the blocks of the level."""
    role: Literal["layer", "block", "resample", "progressive"]
    attends: bool = False


def parts(net: NCSNpp) -> Iterator[Part]:
    """All of a network."""
    if net.frequencies is not None:
        yield Part("frequencies", 0, "top", 0, 0, "layer")
    given = [place for place in ("label", "augment") if getattr(net, place) is not None]
    for place in ("time.0", "time.1", *given, "conv_in"):
        yield Part(place, 0, "top", 0, 0, "layer")
    yield from _levels(net, "down")
    for i, block in enumerate(net.middle):
        yield Part(f"middle.{i}", 0, "middle", len(net.down) - 1, i, "block", block.attention is not None)
    yield from _levels(net, "up")
    for place in ("norm_out", "conv_out"):
        yield Part(place, 0, "end", 0, 0, "layer")


def _levels(net: NCSNpp, side: Literal["down", "up"]) -> Iterator[Part]:
    stages = net.down if side == "down" else net.up
    for i, stage in enumerate(stages):
        level, number = (i if side == "down" else len(stages) - 1 - i), 0
        for r, run in enumerate(stage.runs):
            for j in range(run.count):
                yield Part(f"{side}.{i}.runs.{r}", j, side, level, number, "block", run.attention is not None)
                number += 1
        for role in ("resample", "progressive"):
            if getattr(stage, role) is not None:
                yield Part(f"{side}.{i}.{role}", 0, side, level, 0, role)


def names_of(net: NCSNpp, name: Callable[[Part, str], str]) -> Names:
    """`name(part, layer)` of each parameter, `layer` its path within the part, as `attention.query.weight`."""
    by_place: dict[str, list[Part]] = {}
    for part in parts(net):
        by_place.setdefault(part.place, []).append(part)
    names: Names = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(net):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        place = next(place for place in by_place if f"{path}.".startswith(f"{place}."))
        found = by_place[place]
        shape = leaf.shape[1:] if ".runs." in path else leaf.shape
        names.append({name(part, path[len(place) + 1 :]): shape for part in found})
    return names


def fill(model: M, names: Names, found: dict[str, Any], source: Any) -> M:
    """A tree of the structure of `model` with the arrays `found`, in our layout, by their published names.

    Raises `UserError` naming those that are missing, unexpected or of another shape.
    """
    _check({name: shape for each in names for name, shape in each.items()}, found, source)
    leaves, structure = jax.tree.flatten(model)

    def loaded(each: dict[str, tuple[int, ...]], leaf: Any) -> jax.Array:  # one at a time: none is held twice
        made = np.empty((len(each), *next(iter(each.values()))), np.float32)
        for i, name in enumerate(each):
            made[i] = found[name]
            let_go(found[name])
        return jax.device_put(made.reshape(leaf.shape))  # which copies nothing on a CPU

    return jax.tree.unflatten(structure, [loaded(*pair) for pair in zip(names, leaves, strict=True)])


def ours(value: np.ndarray) -> np.ndarray:
    """A parameter of PyTorch's layers in our layout: kernels HWIO, matrices from inputs to outputs."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _check(wanted: dict[str, tuple[int, ...]], found: dict[str, Any], source: Any) -> None:
    """Raise `UserError` with every parameter that does not match."""
    lines = [f"missing: {name} {wanted[name]}" for name in wanted if name not in found]
    for name, value in found.items():
        shape, kind = np.shape(value), getattr(value, "dtype", type(value).__name__)
        if name not in wanted:
            lines.append(f"unexpected: {name} {shape}")
        elif shape != wanted[name]:
            lines.append(f"shape: {name} is {shape}, the network's {wanted[name]}")
        elif not (isinstance(value, np.ndarray) and jnp.issubdtype(kind, jnp.floating)):
            lines.append(f"type: {name} is {kind}, not floating")
        else:
            if not np.isfinite(value.astype(np.float32)).all():
                lines.append(f"values: {name} is not finite")
            let_go(value)
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        told = " ".join(
            "; ".join([*(f"{line:.200}" for line in lines[:SHOWN]), *more]).split()
        )  # whatever the names hold
        raise UserError(f"{source} does not fit this network; {len(lines)} parameter(s) do not match: {told}")
