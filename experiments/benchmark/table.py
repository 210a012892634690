"""The rows of the table, and how they are timed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax


class Target(NamedTuple):
    """What a row should reach: a bound on its value, or on its ratio to the baseline."""

    of: Literal["value", "ratio"]
    sign: Literal["≤", "≥"]
    bound: float

    def __str__(self) -> str:
        return f"{'ratio ' if self.of == 'ratio' else ''}{self.sign} {self.bound:.4g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure, what it is compared with, measured in the same run, and what it should be."""

    figure: str
    value: float
    unit: str
    baseline: str = ""
    baseline_value: float | None = None
    target: Target | None = None

    @property
    def ratio(self) -> float | None:
        """Value over baseline."""
        return self.value / self.baseline_value if self.baseline_value else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        number = self.value if self.target.of == "value" else self.ratio
        assert number is not None, f"{self.figure}: a target for a ratio needs a baseline"
        return number <= self.target.bound if self.target.sign == "≤" else number >= self.target.bound

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        baseline = "" if self.baseline_value is None else f"{self.baseline}: {_number(self.baseline_value)} {self.unit}"
        verdict = {None: "", True: ", met", False: ", missed"}[self.met]
        ratio = "" if self.ratio is None else _number(self.ratio)
        return self.figure, f"{_number(self.value)} {self.unit}", baseline, ratio, f"{self.target or ''}{verdict}"

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        target = None if self.target is None else str(self.target)
        return dataclasses.asdict(self) | {"target": target, "ratio": self.ratio, "met": self.met}


HEADER = ("figure", "value", "baseline", "ratio", "target")


def line(cells: tuple[str, ...]) -> str:
    """One row in Markdown."""
    return f"| {' | '.join(cells)} |"


def _number(x: float) -> str:
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:.4g}"


def interleaved(*calls: Callable[[], Any], repeats: int, rest: float = 0.0) -> list[float]:
    """The least seconds of each call: after one of each to warm up, they take turns, so that all see the same machine.

    What a call returns is waited for. Each begins after `rest` seconds of idleness.
    """
    least = [math.inf] * len(calls)
    for turn in range(repeats + 1):
        for i, call in enumerate(calls):
            time.sleep(rest)
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                least[i] = min(least[i], time.perf_counter() - start)
    return least


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep to one core what this thread does inside, and every thread and process that it starts (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def on_cpu() -> bool:
    """Whether sizes should be small."""
    return jax.default_backend() == "cpu"
