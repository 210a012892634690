"""Where a training step spends its time, by the profile of the device that makes it."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from experiments.benchmark.table import Row

MOST = 12  # kinds of kernels that are told


def profile(work: Callable[[], Any], name: str, steps: int = 3) -> Iterator[Row]:
    """The kinds of kernels of a training step, which has run before, by their time in it.

    The profile itself, for TensorBoard and Perfetto, stays in runs/profile-NAME-TIME.
    """
    folder = Path("runs", time.strftime(f"profile-{name}-%Y%m%d-%H%M%S"))
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready([work() for _ in range(steps)])
    for kind, seconds in kernels(folder)[:MOST]:
        yield Row(f"{name}, profile: {kind}", 1e3 * seconds / steps, "ms of a step")


def kernels(folder: Path) -> list[tuple[str, float]]:
    """Each kind of kernel in a profile, `fusion` of `fusion.12`, and its seconds, the longest first.

    Of a GPU those of its streams, of a TPU those of its operations; of a CPU what XLA's threads did, in which a loop
    counts with its body.
    """
    planes = [plane for path in folder.rglob("*.xplane.pb") for plane in ProfileData.from_file(str(path)).planes]
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    lines = [line for plane in devices or planes for line in plane.lines]
    wanted = "Stream|XLA Ops" if devices else "tf_XLA"
    seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    for event in (event for line in lines if re.match(wanted, line.name) for event in line.events):
        if "::" not in event.name and not event.name.startswith("end: "):  # no marks of the runtime
            seconds[re.sub(r"[._]\d+", "", event.name)] += event.duration_ns / 1e9
    return sorted(seconds.items(), key=lambda item: -item[1])
