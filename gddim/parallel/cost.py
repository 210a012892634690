"""What a training step costs on a machine, measured in its compiled program or worked out on paper."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array, PyTree

from gddim.errors import UserError
from gddim.parallel.mesh import Rule, bytes_per_device, default_rule, per_device_batch, round_up, state_shardings


class Chip(NamedTuple):
    """Dense bfloat16 (float16 before Ampere) FLOP/s and bytes of memory of what JAX calls one device."""

    flops: float
    memory: float


# By `jax.Device.device_kind`. TPU: cloud.google.com/tpu/docs, pages v2 … tpu7x, "peak compute per chip"; v2, v3 and 7x
# show each of a chip's two cores as a device. NVIDIA: the data sheets of V100, T4, A10G, A100, L4, L40S, H100, H200 and
# B200, tensor cores without sparsity.
CHIPS = {
    "TPU v2": Chip(23e12, 8e9),
    "TPU v3": Chip(61.5e12, 16e9),
    "TPU v4": Chip(275e12, 32e9),
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), Chip(197e12, 16e9)),
    **dict.fromkeys(("TPU v5", "TPU v5p"), Chip(459e12, 95e9)),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), Chip(918e12, 32e9)),
    "TPU7x": Chip(1153.5e12, 96e9),
    "Tesla V100-PCIE-16GB": Chip(112e12, 16e9),
    "Tesla V100-PCIE-32GB": Chip(112e12, 32e9),
    "Tesla V100-SXM2-16GB": Chip(125e12, 16e9),
    "Tesla V100-SXM2-32GB": Chip(125e12, 32e9),
    "Tesla T4": Chip(65e12, 16e9),
    "NVIDIA A10G": Chip(70e12, 24e9),
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), Chip(312e12, 40e9)),
    **dict.fromkeys(("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), Chip(312e12, 80e9)),
    "NVIDIA L4": Chip(121e12, 24e9),
    "NVIDIA L40S": Chip(362e12, 48e9),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9),
    "NVIDIA H100 NVL": Chip(835e12, 94e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9),
    "NVIDIA H200": Chip(989e12, 141e9),
    "NVIDIA B200": Chip(2250e12, 180e9),
}


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a `jax.Device.device_kind`; None when unknown."""
    known = CHIPS.get(kind)
    return known.flops if known else None


_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-done)?\(",
    re.M,
)
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


def arrays(shapes: str) -> list[tuple[int, tuple[int, ...]]]:
    """The bytes of an element, and the axes, of each array that stands in a piece of a compiled program."""
    return [
        (-(-int(bits or 8) // 8), tuple(map(int, filter(None, axes.split(",")))))  # pred has no width: a byte
        for _, bits, axes in _SHAPE.findall(shapes)
    ]


def collectives(compiled: str) -> dict[str, tuple[int, int]]:
    """How often each collective appears in a compiled program (`compiled.as_text()`), and the bytes of its results.

    Per device and execution; what stands in a loop counts once.
    """
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in _COLLECTIVE.findall(compiled):
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + sum(size * math.prod(axes) for size, axes in arrays(shapes))
    return found


class Cost(NamedTuple):
    """A training step on one device of a mesh: bytes of memory, examples, and bytes sent to other devices."""

    state: int
    """Its part of parameters, EMA and optimiser state."""
    working: int
    """The gathered parameters and their gradients, also those summed over parts, while a step runs."""
    activations: int
    """What the forward pass of one part of the batch keeps for the backward pass."""
    batch: int
    """Examples."""
    sent: int
    """By ring algorithms: parameters gathered once; after each part gradients scattered, and summed over the rest."""


def activation_bytes(
    loss: Callable[..., Array], params: PyTree[jax.ShapeDtypeStruct], example: tuple[PyTree[jax.ShapeDtypeStruct], ...]
) -> int:
    """Bytes per example that the forward pass of `loss(params, *batch)` keeps, by its trace; `example` is one row.

    A compiler may fuse some of it away.
    """
    rows = 4096  # enough that the parameters, which are kept as well, do not count
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype), example)
    return _bytes(jax.eval_shape(lambda p, *b: jax.vjp(lambda p: loss(p, *b), p)[1], params, *batch)) // rows


def step_cost(
    params: PyTree[jax.ShapeDtypeStruct],
    state: PyTree[jax.ShapeDtypeStruct],
    activations: int,
    batch_size: int,
    mesh: Mesh | AbstractMesh,
    rule: Rule = default_rule,
    accumulate: int = 1,
) -> Cost:
    """The cost of a step on paper: nothing is compiled, and the mesh may be abstract.

    `state` is all that training keeps, `params` the part that is differentiated, `activations` the bytes per example.
    `rule` sees the parameters as `model/…`; a step takes the batch in `accumulate` parts.
    """
    part = per_device_batch(batch_size, mesh, accumulate)
    whole = _bytes(params)
    missing = whole - bytes_per_device(_placed({"model": params}, mesh, rule))
    gradients = whole if accumulate == 1 else 2 * whole
    # Of a parameter that n of all devices split, a ring gathers the share 1 − 1/n, scatters as much of its gradient, and
    # sums the n-th that is left over size / n devices: 2 (1 − 1/size) together, whatever n is.
    reduced = 2 * whole * (1 - 1 / mesh.size) - missing
    return Cost(
        state=bytes_per_device(_placed(state, mesh, rule)),
        working=missing + gradients,
        activations=activations * part,
        batch=part * accumulate,
        sent=round(missing + accumulate * reduced),
    )


MACHINES = {"v4-32": ("TPU v4", 16), "v5p-256": ("TPU v5p", 128), "64 H100": ("NVIDIA H100 80GB HBM3", 64)}


def on_paper(
    params: PyTree[jax.ShapeDtypeStruct],
    state: PyTree[jax.ShapeDtypeStruct],
    activations: int,
    batch_size: int,
    rule: Rule = default_rule,
    accumulate: int = 1,
) -> list[str]:
    """A line for each of `MACHINES`: `step_cost` there, with the least `fsdp` that leaves a tenth of the memory free.

    The batch is rounded up to a multiple of the devices, so that each part has an example on every one.
    """
    lines = []
    for name, (kind, devices) in MACHINES.items():
        limit, line = CHIPS[kind].memory, ""
        batch = round_up(batch_size, devices * accumulate)
        for fsdp in (2**i for i in range(devices.bit_length())):
            mesh = AbstractMesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
            try:
                cost = step_cost(params, state, activations, batch, mesh, rule, accumulate)
            except UserError as error:  # a rule that divides the arrays on the user's mesh need not do so on this one
                line = line or f"{name}: {error}"
                continue
            memory = cost.state + cost.working + cost.activations
            line = (
                f"{name}: {devices} × {kind}, data={devices // fsdp} × fsdp={fsdp}, {cost.batch} examples a device: "
                f"state {_gigabytes(cost.state)} + parameters and gradients {_gigabytes(cost.working)} + activations "
                f"{_gigabytes(cost.activations)} = {_gigabytes(memory)} of {limit / 1e9:.0f} GB; "
                f"{_gigabytes(cost.sent)} GB sent a step"
            )
            if memory < 0.9 * limit:
                break
        lines.append(line)
    return lines


def _gigabytes(count: int) -> str:
    """To three significant digits, without an exponent."""
    return np.format_float_positional(count / 1e9, precision=3, fractional=False, trim="-")


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _placed(shapes: PyTree, mesh: Mesh | AbstractMesh, rule: Rule) -> PyTree[jax.ShapeDtypeStruct]:
    shardings = state_shardings(shapes, mesh, rule)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )
