"""The headline's training step, compiled for accelerators that are not here.

    GDDIM_EXTRAS=tpu,cuda JAX_PLATFORMS=cpu ./infra/run python -m experiments.benchmark ahead

The compilers for TPUs and for NVIDIA's GPUs run on any Linux machine. They tell whether a step compiles, what it holds on
each device, and for TPUs how many cycles each fused loop should take. How long it takes only the chip can tell.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from experiments import cld_cifar10
from experiments.benchmark.table import Row
from experiments.benchmark.training import resized
from gddim.errors import UserError
from gddim.experiment.plan import Plan
from gddim.parallel import MeshConfig, batch_sharding, step_cost

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
    width: int = 128
    fsdp: int = 1
    batch: int = 128
    scan: bool = True


MACHINES = {
    "a chip of v5e": Machine("tpu", "v5e:2x2", 1, batch=8),
    "a chip of v5p": Machine("tpu", "v5p:2x2x1", 1),
    "v4-32": Machine("tpu", "v4:2x2x4", 16),
    "v5p-256": Machine("tpu", "v5p:4x4x8", 128),
    "1 B parameters, v4-32": Machine("tpu", "v4:2x2x4", 16, width=384),
    "1 B parameters, v4-32, fsdp 4": Machine("tpu", "v4:2x2x4", 16, width=384, fsdp=4),
    "an H200": Machine("cuda", "1x1x1", 1, scan=False),
}
# What libtpu would otherwise ask of a machine with TPUs.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
PLUGINS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}


def ahead(names: tuple[str, ...] = tuple(MACHINES)) -> Iterator[Row]:
    """Compilation, memory against that of `--dry-run`, and a TPU's cycles, of the step in bfloat16 on each machine."""
    for name in names:
        machine = MACHINES[name]
        if not importlib.util.find_spec(PLUGINS[machine.platform]):
            raise UserError(f"{name} needs {PLUGINS[machine.platform]}: pip install 'gddim[{machine.platform}]'")
        plan = planned(machine)
        start = time.perf_counter()
        program = compiled(plan)
        seconds = time.perf_counter() - start
        scanned = ", scanned" if machine.scan else ""
        title = f"cld_cifar10 on {name}, bfloat16{scanned}, batch {machine.batch} over {machine.devices}"
        yield Row(f"{title}: trace and compile", seconds, "s")
        memory = program.memory_analysis()
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        yield Row(f"{title}: memory of a device", used / 1e9, "GB", "on paper", paper(plan) / 1e9)
        if machine.platform == "tpu":
            yield Row(f"{title}: by the compiler's estimate", cycles(program.as_text()) / 1e6, "million cycles")


def devices(machine: Machine) -> list[Any]:
    """Descriptions of a machine's devices, enough to compile for them."""
    options: dict[str, Any] = {"topology": machine.topology, "target_config": H200}
    if machine.platform == "tpu":
        os.environ.update(NO_TPU)
        options = {"chip_config_name": "megacore"} if machine.topology.startswith("v4") else {}  # a device a chip
    described = topologies.get_topology_desc(machine.topology, machine.platform, **options)
    return list(described.devices)[: machine.devices]


def planned(machine: Machine) -> Plan:
    """The headline, made ready for the machine."""
    fields = {"width": machine.width, "scan_blocks": machine.scan, "dtype": "bfloat16"}
    experiment = resized(cld_cifar10.EXPERIMENT, machine.batch, **fields)
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


def cycles(text: str) -> int:
    """The sum of the `estimated_cycles` of a scheduled TPU program, those of a loop's body times its turns."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for each in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", each):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(each)

    def total(name: str) -> int:
        found = 0
        for each in bodies[name]:
            if own := re.search(r'"estimated_cycles":"(\d+)"', each):
                found += int(own[1])
            if loop := re.search(r" while\(.* condition=%?([\w.-]+), body=%?([\w.-]+)", each):
                bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[loop[1]]))
                found += max(map(int, bounds), default=1) * total(loop[2])
            elif called := re.search(r" call\(.* to_apply=%?([\w.-]+)", each):
                found += total(called[1])
        return found

    return total(entry)
