"""python -m experiments.benchmark [NAME …] [--json PATH]: what the system costs, on the devices that are there.

Prints one table in Markdown, a row as soon as it is measured: a figure, its baseline of the same run, the ratio, and
the target where there is one. The same goes to a JSON file, with command, commit, devices, versions and duration.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmark import ahead, data, evaluation, mathematics, peers, training
from experiments.benchmark.table import HEADER, Row, line
from gddim.errors import UserError, printable
from gddim.evaluation.provenance import hardware, software
from gddim.parallel import check_backend

BENCHES: dict[str, Callable[[], Iterator[Row]]] = {
    "coefficients": mathematics.coefficients,
    "noise_factor": mathematics.noise_factor,
    "sampler": mathematics.sampler,
    "loop": training.loop,
    "loader": data.loader,
    "labels": training.labels,
    "checkpoint": training.checkpoint,
    "networks": training.networks,
    "evaluation": evaluation.evaluation,
    "peers": peers.peers,
    "ahead": ahead.ahead,
}


def measure(names: Sequence[str], rows: list[dict[str, Any]], missing: list[str]) -> None:
    """Print the rows of these benches and add them to `rows`; `missing` tells why a bench ended early."""
    for name in names:
        try:
            for row in BENCHES[name]():
                rows.append({"bench": name, **row.describe()})
                print(line(row.cells()), flush=True)
        except Exception as error:  # memory that a device lacks, say: the other benches are measured all the same
            missing.append(f"{name}: {error}" if isinstance(error, UserError) else f"{name}: {error!r}")


def run(names: Sequence[str], path: Path, command: str) -> None:
    """Measure, print, and write `path`, which is taken at once so that nothing is measured in vain."""
    with path.open("x", encoding="utf-8") as file:
        began = time.perf_counter()
        origin = {
            "command": command,
            "devices": hardware(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            **software(),
        }
        print(f"`{command}` at {origin['commit']}, {origin['devices']}, {origin['date']}\n")
        print(line(HEADER), line(("---",) * len(HEADER)), sep="\n", flush=True)
        rows, missing = [], []
        try:
            measure(names, rows, missing)
        finally:  # Ctrl-C keeps what was measured
            origin["seconds"] = round(time.perf_counter() - began, 1)
            json.dump({**origin, "rows": rows, "not measured": missing}, file, indent=1, ensure_ascii=False)
        print("", *missing, f"{origin['seconds']:.0f} s, written to {path}", sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Ends with status 2 for a name or a path that cannot be."""
    printable()
    parser = argparse.ArgumentParser(
        "python -m experiments.benchmark", description="What the system costs, measured here."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all of them by default")
    parser.add_argument("--json", type=Path, help="a new file; by default one with the time in its name, under runs/")
    options = parser.parse_args(argv)
    path = options.json or Path("runs", time.strftime("benchmark-%Y%m%d-%H%M%S.json"))
    arguments = sys.argv[1:] if argv is None else argv
    try:
        check_backend()
        if unknown := [name for name in options.names if name not in BENCHES]:
            raise UserError(f"no benchmark {unknown[0]!r}; accepted: {', '.join(BENCHES)}")
        if path.exists():
            raise UserError(f"--json {path} exists and is not overwritten: name a new file")
        path.parent.mkdir(parents=True, exist_ok=True)
        run(options.names or list(BENCHES), path, shlex.join(["python", "-m", "experiments.benchmark", *arguments]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; the rows so far are in {path}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is one of the figures
    main()
