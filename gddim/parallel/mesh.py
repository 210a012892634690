"""Meshes with the axes `data` and `fsdp`, and where each array of a training run lives on them."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from gddim.errors import UserError

SMALL = 4  # elements a device: an array that would leave fewer is not worth a message of its own

Rule = Callable[[str, tuple[int, ...], Mesh | AbstractMesh], P]


@dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes are arranged. The batch is split over both axes."""

    data: int = -1
    """Groups of devices that each hold one copy of the state; -1: as many as the devices allow."""
    fsdp: int = 1
    """Devices that split one copy of parameters, EMA and optimiser state among them."""


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh `data × fsdp` over all devices of all processes (or over `devices`), with `Auto` axes.

    Devices go in the order of their processes, so that row i of a batch is the same record, with the same noise, on any
    mesh, while process p of n reads the p-th n-th of it, and an fsdp group lies within a host where it fits.
    (`jax.make_mesh` would follow the wiring of a TPU slice instead, and scatter a host's rows.)
    Raises `UserError` when the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, data, fsdp = len(devices), config.data, config.fsdp
    if fsdp < 1 or (data < 1 and data != -1):
        raise UserError(f"mesh.data={data}, mesh.fsdp={fsdp}: sizes must be positive (mesh.data=-1: fill the devices)")
    if count % fsdp or (data != -1 and data * fsdp != count):
        fit = ", ".join(f"{count // f}×{f}" for f in range(1, count + 1) if count % f == 0)
        raise UserError(f"mesh.data={data}, mesh.fsdp={fsdp} do not fit {count} device(s); data×fsdp may be {fit}")
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(ordered).reshape(count // fsdp, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading axis split over both mesh axes, so that every device has its own examples."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def default_rule(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Split the largest axis that `fsdp` divides (the last of equals); small or indivisible arrays are replicated.

    A rule is any function of these arguments: `lambda path, shape, mesh: P() if "embed" in path else
    default_rule(path, shape, mesh)` replicates one part. `path` is like `ema/blocks/0/conv/weight`.
    """
    fsdp = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < SMALL * fsdp or not divisible:
        return P()
    axis = max(divisible, key=lambda axis: (shape[axis], axis))
    return P(*(None,) * axis, "fsdp")


def state_shardings(shapes: PyTree, mesh: Mesh | AbstractMesh, rule: Rule = default_rule) -> PyTree[NamedSharding]:
    """The sharding of each array in a tree of arrays or `ShapeDtypeStruct`s."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = rule(name, leaf.shape, mesh)
        axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
        parts = [math.prod(mesh.shape[name] for name in names) for names in axes]
        if len(parts) > leaf.ndim or any(size % n for size, n in zip(leaf.shape, parts, strict=False)):
            raise UserError(f"rule: {spec} does not divide {name} of shape {leaf.shape} on the mesh {dict(mesh.shape)}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, shapes)


def init_sharded(make: Callable[[], PyTree], mesh: Mesh, rule: Rule = default_rule) -> PyTree:
    """`make()` placed as `rule` says: with `fsdp` > 1 each device computes its own part, and nobody holds the whole.

    Leaves of the result that are no arrays (functions, numbers) are passed through.
    """
    if mesh.shape["fsdp"] == 1:  # each device holds everything anyway, and nothing need be compiled
        arrays, static = eqx.partition(make(), eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        shardings = jax.tree.leaves(state_shardings(arrays, mesh, rule))
        del arrays
        placed = [_place(leaves.pop(0), sharding) for sharding in shardings]  # one after another: not all of it twice
        return eqx.combine(jax.tree.unflatten(structure, placed), static)
    shapes = eqx.filter_eval_shape(make)
    shapes, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    leaves = [leaf for program in init_programs(make, shapes, mesh, rule) for leaf in program()]
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), leaves), static)


def init_programs(make: Callable[[], PyTree], shapes: PyTree, mesh: Mesh, rule: Rule = default_rule) -> list[Any]:
    """Jitted functions that give the leaves of `make()` in order, some at a time: what a device holds meanwhile is a
    sixteenth of the state, or the largest leaf.
    """
    specs = [sharding.spec for sharding in jax.tree.leaves(state_shardings(shapes, mesh, rule))]
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)]
    ends, filled = [], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > sum(sizes) / 16:
            ends, filled = [*ends, i], 0
        filled += size

    def program(part: slice) -> Any:
        def leaves() -> list[jax.Array]:
            whole = jax.tree.leaves(eqx.filter(make(), eqx.is_array))[part]
            return [_cut(leaf, spec) for leaf, spec in zip(whole, specs[part], strict=True)]

        # By hand: the partitioner would split what the parts are cut from as well, into a program eight times as long.
        return jax.jit(jax.shard_map(leaves, mesh=mesh, in_specs=(), out_specs=specs[part], check_vma=False))

    return [program(slice(*ends)) for ends in itertools.pairwise([0, *ends, len(sizes)])]


def _place(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _cut(x: jax.Array, spec: P) -> jax.Array:
    """This device's part of an array that all of them have computed."""
    for axis, name in enumerate(spec):
        if name is not None:
            size = x.shape[axis] // jax.lax.axis_size(name)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * size, size, axis)
    return x


def round_up(count: int, multiple: int) -> int:
    """The least multiple that is no less: what `count` rows are filled up to so that every device has as many."""
    return -(-count // multiple) * multiple


def per_device_batch(batch_size: int, mesh: Mesh | AbstractMesh, accumulate: int = 1) -> int:
    """Examples of each of `accumulate` parts of a global batch on each device; `UserError` when they do not divide it."""
    if batch_size < 1 or batch_size % (mesh.size * accumulate):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"batch {batch_size}{parts} cannot be split over {mesh.size} device(s): "
            f"use a multiple of {mesh.size * accumulate}"
        )
    return batch_size // (mesh.size * accumulate)


def global_batch(local: PyTree[np.ndarray], mesh: Mesh) -> PyTree[jax.Array]:
    """The global batch of which process p of n read the p-th n-th; each device is given its own rows only."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), local)


def bytes_per_device(tree: PyTree) -> int:
    """Bytes that the arrays (or `ShapeDtypeStruct`s with shardings) of a tree occupy on each device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "sharding", None) is not None]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def mesh_in_words(mesh: Mesh, state: PyTree) -> str:
    """One line for the start of a run: processes, devices, mesh, bytes of state on each device."""
    kind = mesh.devices.flat[0].device_kind
    return (
        f"{jax.process_count()} process(es), {mesh.size} device(s) ({kind}), mesh data={mesh.shape['data']} × "
        f"fsdp={mesh.shape['fsdp']}, {bytes_per_device(state) / 2**20:.1f} MiB of state per device"
    )
