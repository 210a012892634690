"""The training steps of the headline and of `cifar10`, compiled for accelerators that are not here.

    GDDIM_EXTRAS=tpu,cuda JAX_PLATFORMS=cpu ./infra/run python -m experiments.benchmark ahead

The compilers for TPUs and for NVIDIA's GPUs run on any Linux machine. They tell whether a step compiles, what it holds on
each device, for TPUs how many cycles each fused loop should take, and for an H200 what each kernel reads, writes and
multiplies. How long it takes only the chip can tell.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from experiments import cifar10, cld_cifar10
from experiments.benchmark.table import Row
from experiments.benchmark.training import resized
from gddim.errors import UserError
from gddim.experiment import Experiment
from gddim.experiment.plan import Plan
from gddim.parallel import MeshConfig, batch_sharding, step_cost
from gddim.parallel.cost import arrays

# What XLA asks of a GPU, as the H200 answers.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""


class Machine(NamedTuple):
    """Devices of one kind, and the step that they are given."""

    platform: str
    topology: str
    devices: int
    experiment: Experiment = cld_cifar10.EXPERIMENT
    fsdp: int = 1
    scan: bool = True


BILLION = resized(cld_cifar10.EXPERIMENT, width=384)
MACHINES = {
    "a chip of v5e": Machine("tpu", "v5e:2x2", 1, resized(cld_cifar10.EXPERIMENT, batch=8)),
    "a chip of v5p": Machine("tpu", "v5p:2x2x1", 1),
    "v4-32": Machine("tpu", "v4:2x2x4", 16),
    "v5p-256": Machine("tpu", "v5p:4x4x8", 128),
    "1 B parameters, v4-32": Machine("tpu", "v4:2x2x4", 16, BILLION),
    "1 B parameters, v4-32, fsdp 4": Machine("tpu", "v4:2x2x4", 16, BILLION, fsdp=4),
    "an H200": Machine("cuda", "1x1x1", 1, scan=False),
    "cifar10 on an H200": Machine("cuda", "1x1x1", 1, cifar10.EXPERIMENT, scan=False),
}
# What libtpu would otherwise ask of a machine with TPUs.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
PLUGINS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}


def ahead(names: tuple[str, ...] = tuple(MACHINES)) -> Iterator[Row]:
    """Of the step in bfloat16 on each machine: compilation, memory against that of `--dry-run`, cycles or a roofline."""
    for name in names:
        machine = MACHINES[name]
        if not importlib.util.find_spec(PLUGINS[machine.platform]):
            raise UserError(f"{name} needs {PLUGINS[machine.platform]}: pip install 'gddim[{machine.platform}]'")
        plan = planned(machine)
        start = time.perf_counter()
        program = compiled(plan)
        seconds = time.perf_counter() - start
        step = f"bfloat16{', scanned' * machine.scan}, batch {plan.experiment.train.batch} over {machine.devices}"
        title = f"{plan.experiment.name} on {name.rpartition(' on ')[2]}, {step}"
        yield Row(f"{title}: trace and compile", seconds, "s")
        memory = program.memory_analysis()
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        yield Row(f"{title}: memory of a device", used / 1e9, "GB", "on paper", paper(plan) / 1e9)
        if machine.platform == "tpu":
            yield Row(f"{title}: by the compiler's estimate", cycles(program.as_text()) / 1e6, "million cycles")
        else:
            whole, products = 1e3 * roofline(program.as_text())
            yield Row(f"{title}: a roofline of its program", whole, "ms", "its convolutions and products", products)


def devices(machine: Machine) -> list[Any]:
    """Descriptions of a machine's devices, enough to compile for them."""
    options: dict[str, Any] = {"topology": machine.topology, "target_config": H200}
    if machine.platform == "tpu":
        os.environ.update(NO_TPU)
        options = {"chip_config_name": "megacore"} if machine.topology.startswith("v4") else {}  # a device a chip
    described = topologies.get_topology_desc(machine.topology, machine.platform, **options)
    return list(described.devices)[: machine.devices]


def planned(machine: Machine) -> Plan:
    """The machine's experiment, made ready for it."""
    experiment = resized(machine.experiment, scan_blocks=machine.scan, dtype="bfloat16")
    return Plan(dataclasses.replace(experiment, mesh=MeshConfig(fsdp=machine.fsdp)), devices(machine))


def compiled(plan: Plan) -> Any:
    """The step of an experiment on images."""
    train, shape = plan.experiment.train, plan.experiment.data.shape
    batch = jax.ShapeDtypeStruct((train.batch, *shape), jnp.uint8, sharding=batch_sharding(plan.mesh))
    return plan.update(flip=True).lower(jax.tree.leaves(plan.shapes), batch).compile()


def paper(plan: Plan) -> int:
    """Bytes on each device by `gddim.parallel.step_cost`."""
    batch, rule = plan.experiment.train.batch, plan.experiment.rule
    cost = step_cost(plan.shapes.model, plan.shapes, plan.activation_bytes(), batch, plan.mesh, rule)
    return cost.state + cost.working + cost.activations


class Instruction(NamedTuple):
    """A line of a compiled program: `name = shape kind(operands), rest`."""

    name: str
    shape: str
    kind: str
    operands: str
    rest: str


INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(?:,|$)(.*)")


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a compiled program by their names, and the name of that where it begins."""
    bodies: dict[str, list[Instruction]] = {}
    entry = name = ""
    for each in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", each):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name and (found := INSTRUCTION.match(each)):
            bodies[name].append(Instruction(*found.groups()))
    return bodies, entry


def total(bodies: dict[str, list[Instruction]], name: str, cost: Callable[[Instruction], Any]) -> Any:
    """The sum of the costs of a computation's instructions, those of a loop's body times its turns."""
    found = 0
    for each in bodies[name]:
        found += cost(each)
        if loop := re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", each.rest):
            known = re.findall(r'"known_trip_count":\{"n":"(\d+)"', each.rest)
            bounds = [x.operands for x in bodies[loop[1]] if x.kind == "constant" and x.shape.startswith("s32[]")]
            found += max(map(int, known or bounds), default=1) * total(bodies, loop[2], cost)
        elif each.kind == "call" and (called := re.search(r"to_apply=%?([\w.-]+)", each.rest)):
            found += total(bodies, called[1], cost)
    return found


def cycles(text: str) -> int:
    """The sum of the `estimated_cycles` of a scheduled TPU program."""
    return total(
        *computations(text), lambda each: sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', each.rest)[:1]))
    )


NAME = re.compile(r"%([\w.-]+)")
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
SLICES = {"slice", "dynamic-slice", "gather"}


def roofline(text: str) -> np.ndarray:
    """The seconds of a compiled program on an H200 by a roofline, and of these its convolutions' and products'.

    A kernel takes the longest of its bytes at 85 % of 4.8 TB/s, its operations at 65 % of 989 TFLOP/s, and 2 µs.
    """
    bodies, entry = computations(text)
    shapes = {each.name: each.shape for body in bodies.values() for each in body}

    def kernel(each: Instruction) -> np.ndarray:
        if each.kind in NO_KERNEL:
            return np.zeros(2)
        fused = re.search(r"calls=%?([\w.-]+)", each.rest)
        body = bodies[fused[1]] if fused else [each]
        given = read(body) if fused else (shapes[name] for name in NAME.findall(each.operands))
        made = sizes(each.shape)[: 1 if each.kind == "custom-call" else None]  # what else that returns is a workspace
        if body[-1].kind == "dynamic-update-slice":  # in place: its array is not read, and but a part of it written
            made = [sizes(shapes[NAME.findall(body[-1].operands)[1]])[0] - made[0]]
        products = sum(operations(x, shapes) for x in body)
        seconds = max(sum(sizes(*given) + made) / (0.85 * 4.8e12), products / (0.65 * 989e12), 2e-6)
        return np.array([seconds, seconds if products else 0.0])

    return total(bodies, entry, kernel)


def sizes(*shapes: str) -> list[int]:
    """The bytes of each array."""
    return [size * math.prod(axes) for size, axes in arrays(" ".join(shapes))]


def read(body: list[Instruction]) -> Iterator[str]:
    """The shapes of what a fusion reads: its parameters, or slices of them where it takes no more."""
    for parameter in body:
        if parameter.kind == "parameter":
            uses = [each for each in body if parameter.name in NAME.findall(each.operands)]
            sliced = all(each.kind in SLICES for each in uses)
            yield from (each.shape for each in (uses if sliced else [parameter]))


def operations(each: Instruction, shapes: dict[str, str]) -> int:
    """Multiplications and additions of a product of matrices, or of a convolution or its gradient by cuDNN; else 0."""

    def axes() -> list[tuple[int, ...]]:
        given = (shapes[name] for name in NAME.findall(each.operands)[:2])
        return [arrays(shape)[0][1] for shape in (*given, each.shape)]

    if product := re.search(r'lhs_contracting_dim\w+"?[=:].([\d",]+)', each.rest):
        left, _, result = axes()
        return 2 * math.prod(result) * math.prod(left[int(axis)] for axis in re.findall(r"\d+", product[1]))
    if convolution := re.search(r"dim_labels=\w+_(\w+)->.*__cudnn\$conv\w*(Forward|Input|Filter)", each.rest):
        left, right, result = axes()
        # The forward convolution's output and kernel: a value of that output sums over the kernel's part for its channel.
        output, kernel = {"Forward": (result, right), "Input": (left, right), "Filter": (right, result)}[convolution[2]]
        return 2 * math.prod(output) * math.prod(kernel) // kernel[convolution[1].index("o")]
    return 0
