"""What every verb does under `--dry-run`: tell what it would need."""

from __future__ import annotations

import json
import math

import jax

from gddim.data import OnDisk
from gddim.errors import UserError
from gddim.evaluation.provenance import flatten
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe
from gddim.parallel import bytes_per_device


def dry_run(plan: Plan) -> None:
    """Print, on process 0, what a run would be and what it needs. Nothing is compiled and no array is made."""
    if jax.process_index() != 0:
        return
    experiment = plan.experiment
    for name, value in flatten(describe(experiment)):
        print(f"{name.removesuffix('.type')} = {json.dumps(value, ensure_ascii=False)}")
    total = plan.state_bytes
    facts = {
        "parameters": f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.shapes.model)):,}",
        "devices": f"{plan.mesh.size} × {plan.mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es)",
        "mesh": ", ".join(f"{axis} {n}" for axis, n in plan.mesh.shape.items()),
        "batch per device": f"{experiment.train.batch // plan.mesh.size}",
        "state": f"{total:,} bytes, {bytes_per_device(plan.shapes):,} on each device",
        "checkpoint": f"about {total / 2**20:,.1f} MiB",
        "FLOPs per image, forward": f"{plan.image_flops():,.0f}",
        "FLOPs per training step": f"{plan.step_flops():,.0f}",
    }
    if isinstance(experiment.data, OnDisk):
        try:
            facts["data"] = str(experiment.data.find())
        except UserError as error:
            facts["data"] = f"absent: {error}"
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    print("On paper, a training step on", *plan.on_paper(), sep="\n  ")
