"""python -m experiments.solvers [--samplers …] [--grids …] [--nfe …]: the error of solvers at few calls.

Every sampler on every grid carries the same states from the prior to t_min through mixtures with their exact denoiser; the
truth is their probability flow, by Dormand–Prince 8(7) at a tight tolerance. An error is that of one sample, root mean
square over its dimensions; a cell tells the median over samples, or their root mean square, relative to the reference,
as the geometric mean over mixtures. A mixture is made from its kind and a seed: for what was tuned on some take others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import gddim
from experiments.solvers.mixtures import DATA_STD, KINDS, Mixture, mixture
from gddim.errors import UserError, exit_status, printable
from gddim.samplers.solver import AbstractSampler, AbstractSolver, TableSolver, sharing
from gddim.samplers.words import Grid, OnGrid, parse_grid, parse_sampler, sampler_name, steps_for
from gddim.sde.linalg import Array, product

PROCESSES: dict[str, gddim.AbstractLinearSDE] = {
    "vp": gddim.VP(), "cld": gddim.CLD(), "psld": gddim.PSLD(), "subvp": gddim.SubVP(), "cosine": gddim.VP.cosine(),
    "ve": gddim.VE(),
}  # fmt: skip
REFERENCE = "gddim:3:data", "power:2"
OURS = (
    "gddim:3:data:free@tuned", "gddim:3:data:free@band", "gddim:4:data:free@band", "gddim:3:residual@band:0.16:3",
    "gddim:3:data@band",
)  # fmt: skip
PEERS = ("gddim:4", "ipndm:3", "dpm:2", "unipc:2", "unipc:3")  # the first is DEIS-tAB3
GRIDS = ("power:3", "power:7", "band")
NFE = (5, 6, 8, 10, 15, 20)
T_MIN = 1e-3


class Problem(eqx.Module):
    """Mixtures of one kind on one process: states at the horizon, and where the flow takes them."""

    sde: gddim.AbstractLinearSDE
    mixtures: Mixture
    """Stacked, over the mixtures first."""
    start: Array
    """(mixtures, samples, k, d)."""
    end: Array
    """The data in the state at t_min, (mixtures, samples, d)."""


def problem(sde: gddim.AbstractLinearSDE, kind: str, seeds: Sequence[int], samples: int) -> Problem:
    """The problem of a kind, with a mixture for each seed, in float64."""
    made = [mixture(kind, seed) for seed in seeds]
    mixtures = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *made)
    shape = (len(seeds), samples, sde.k, mixtures.centres.shape[-1])
    rng = np.random.default_rng([*kind.encode(), *seeds])
    root = np.linalg.cholesky(sde.prior_covariance(sde.horizon))
    start = jnp.asarray(root @ rng.normal(size=shape))
    return Problem(sde, mixtures, start, truth(sde, mixtures, start))


@eqx.filter_jit
def truth(sde: gddim.AbstractLinearSDE, mixtures: Mixture, start: Array) -> Array:
    """Where the probability flow carries all states, by diffrax."""
    import diffrax

    def velocity(t: Array, u: Array, _: None) -> Array:
        F, half = sde.velocity_factors(t)
        one = lambda mixture: jax.vmap(lambda u: product(half, gddim.through(sde, mixture)(u, t)))
        return product(F, u) + eqx.filter_vmap(lambda mixture, u: one(mixture)(u))(mixtures, u)

    T, end = jnp.asarray(sde.horizon), jnp.asarray(T_MIN * sde.horizon)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity), diffrax.Dopri8(), T, end, None, start, max_steps=100_000,
        stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-7),
    )  # fmt: skip
    return jnp.asarray(solution.ys)[0][..., 0, :]


@eqx.filter_jit
def errors(solver: AbstractSolver, problem: Problem) -> Array:
    """Of each sample, root mean square over its dimensions, `(mixtures, samples)`."""

    def of_mixture(mixture: Mixture, start: Array) -> Array:
        model, key = gddim.through(problem.sde, mixture), jax.random.key(0)  # unused: these add no noise
        return jax.vmap(lambda u: solver(model, u, key).state[..., 0, :])(start)

    ends = eqx.filter_vmap(of_mixture)(problem.mixtures, problem.start)
    return jnp.sqrt(jnp.mean((ends - problem.end) ** 2, -1))


def typical(solver: AbstractSolver, problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
    """Median and root mean square error in each mixture of all problems."""
    found = np.concatenate([np.asarray(errors(solver, problem)) for problem in problems])
    return np.median(found, -1), np.sqrt(np.mean(found**2, -1))


@dataclasses.dataclass(frozen=True)
class Cell:
    """A sampler on a grid, and its errors in each mixture."""

    process: str
    sampler: str
    grid: str
    nfe: int
    median: list[float]
    rms: list[float]


def measure(
    process: str, pairs: Sequence[tuple[AbstractSampler, Grid]], nfe: Sequence[int], problems: Sequence[Problem]
) -> Iterator[Cell]:
    """The cells of one process."""
    sde = PROCESSES[process]
    for calls in nfe:
        for sampler, grid in pairs:
            try:
                times = grid(sde, sde.horizon, T_MIN * sde.horizon, steps_for(sampler, calls), DATA_STD)
                solver = sharing(sampler.solver(sde, times))
            except ValueError as error:  # not of this process, or of so few calls
                print(f"{process}, {sampler_name(sampler)} on {grid}, {calls} calls: {error}", file=sys.stderr)
                continue
            median, rms = typical(solver, problems)
            yield Cell(process, sampler_name(sampler), str(grid), calls, median.tolist(), rms.tolist())


def ratios(cells: Sequence[Cell], of: str) -> dict[tuple[str, str, str, int], float]:
    """Geometric means over mixtures of errors relative to the reference's, by process, sampler, grid and calls."""
    errors = {(c.process, c.sampler, c.grid, c.nfe): np.maximum(getattr(c, of), 1e-12) for c in cells}
    mean = lambda x: float(np.exp(np.mean(np.log(x))))
    return {key: mean(errors[key] / errors[key[0], *REFERENCE, key[3]]) for key in errors}


def table(cells: Sequence[Cell], of: str) -> str:
    """In Markdown: a row a sampler and grid, best first; a number is relative to the reference."""
    found, lines = ratios(cells, of), []
    for process in dict.fromkeys(c.process for c in cells):
        nfe = sorted({c.nfe for c in cells if c.process == process})
        rows = {
            key[1:3]: [found.get((process, *key[1:3], n), np.nan) for n in nfe] for key in found if key[0] == process
        }
        lines += [f"| {process}, {of} | {' | '.join(f'{n} calls' for n in nfe)} |", f"|---|{'---|' * len(nfe)}"]
        order = sorted(rows, key=lambda row: np.nanmean(np.log(rows[row])))
        lines += [f"| {' on '.join(row)} | {' | '.join(f'{x:.2f}' for x in rows[row])} |" for row in order]
        lines.append("")
    return "\n".join(lines)


def plot(cells: Sequence[Cell], path: Path) -> None:
    """The best grid of each sampler on each process, by median and by root mean square."""
    from matplotlib.figure import Figure

    processes = list(dict.fromkeys(c.process for c in cells))
    figure = Figure(figsize=(5 * len(processes), 8), layout="constrained")
    axes = figure.subplots(2, len(processes), squeeze=False)
    for row, of in zip(axes, ("median", "rms"), strict=True):
        found = ratios(cells, of)
        for ax, process in zip(row, processes, strict=True):
            for sampler in dict.fromkeys(c.sampler for c in cells):
                lines: dict[str, list[tuple[int, float]]] = {}
                for (p, s, grid, n), x in found.items():
                    if (p, s) == (process, sampler):
                        lines.setdefault(grid, []).append((n, x))
                if lines:
                    grid = min(lines, key=lambda grid: np.mean([np.log(x) for _, x in lines[grid]]))
                    ax.loglog(*zip(*sorted(lines[grid]), strict=True), marker=".", label=f"{sampler} on {grid}")
            ax.set(
                title=f"{process}, {of} error", xlabel="network calls", ylabel=f"relative to {' on '.join(REFERENCE)}"
            )
            ax.legend(fontsize=7)
    figure.savefig(path)


def on(word: str, grids: Sequence[str]) -> list[tuple[AbstractSampler, Grid]]:
    """A sampler on the grid that it brings, or on each of them."""
    sampler = parse_sampler(word)
    if isinstance(sampler, OnGrid):
        return [(sampler.sampler, sampler.grid)]
    return [(sampler, parse_grid(grid)) for grid in grids]


def noisy(sampler: AbstractSampler) -> bool:
    """Whether it adds noise, on the first process that it is made for."""
    for sde in PROCESSES.values():
        try:
            solver = sampler.solver(sde, gddim.power_grid(sde.horizon, T_MIN * sde.horizon, 4))
            return isinstance(solver, TableSolver) and solver.stochastic
        except ValueError:
            pass
    return False


def check(processes: Sequence[str], samplers: Sequence[AbstractSampler]) -> None:
    """Raise `UserError` for a name that is none of `PROCESSES`, and for a sampler whose error is not one of few calls."""
    if unknown := set(processes) - set(PROCESSES):
        raise UserError(f"no process {min(unknown)!r}; accepted: {', '.join(PROCESSES)}")
    for sampler in samplers:
        if noisy(sampler) or sampler.nfe(1) is None:
            raise UserError(
                f"{sampler_name(sampler)} adds noise or chooses its own steps: it has no error at few calls"
            )


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write into the folder."""
    pairs = [pair for word in ("@".join(REFERENCE), *options.samplers) for pair in on(word, options.grids)]
    pairs = list(dict.fromkeys(pairs))
    check(options.processes, [sampler for sampler, _ in pairs])
    if min(options.mixtures, options.samples, *options.nfe) < 1:
        raise UserError("--mixtures, --samples and --nfe must be at least 1")
    try:
        options.out.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"--out {options.out} exists and is not overwritten: name a new folder") from None
    seeds = [options.seed + i // len(KINDS) for i in range(options.mixtures)]
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(options.mixtures)]
    by_kind = {kind: [s for k, s in zip(kinds, seeds, strict=True) if k == kind] for kind in dict.fromkeys(kinds)}
    cells: list[Cell] = []
    with (options.out / "cells.jsonl").open("w", encoding="utf-8") as file, jax.enable_x64(True):
        for process in dict.fromkeys(options.processes):
            began = time.perf_counter()
            problems = [problem(PROCESSES[process], kind, own, options.samples) for kind, own in by_kind.items()]
            jax.block_until_ready(problems)
            print(f"{process}: the truth took {time.perf_counter() - began:.0f} s", file=sys.stderr)
            for cell in measure(process, pairs, options.nfe, problems):
                cells.append(cell)
                print(json.dumps(dataclasses.asdict(cell)), file=file, flush=True)
            print(f"{process}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    text = "\n".join(
        [f"Relative to {' on '.join(REFERENCE)}, geometric mean over {options.mixtures} mixtures of seed {options.seed}.\n",
         *(table(cells, of) for of in ("median", "rms"))]
    )  # fmt: skip
    print(text)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    plot(cells, options.out / "errors.png")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Ends with status 2 for what cannot be."""
    printable()
    parser = argparse.ArgumentParser("python -m experiments.solvers", description=__doc__)
    many: dict[str, Any] = dict(nargs="+", metavar="NAME")
    parser.add_argument(
        "--samplers", default=(*OURS, *PEERS), help=f"as --sampler names them ({' '.join((*OURS, *PEERS))})", **many
    )
    parser.add_argument(
        "--grids",
        default=GRIDS,
        help=f"of those that bring none, as --sampling.grid names them ({' '.join(GRIDS)})",
        **many,
    )
    parser.add_argument("--processes", default=("vp", "cld", "psld"), help=f"of {', '.join(PROCESSES)}", **many)
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="network calls a sample")
    parser.add_argument("--mixtures", type=int, default=14, help="how many, of five kinds in turn (14)")
    parser.add_argument("--seed", type=int, default=0, help="the first of each kind; another makes other mixtures (0)")
    parser.add_argument("--samples", type=int, default=96, help="from each mixture (96)")
    parser.add_argument("--out", type=Path, default=None, help="a new folder; by default one with the time in its name")
    options = parser.parse_args(argv)
    options.out = options.out or Path("runs", time.strftime("solvers-%Y%m%d-%H%M%S"))
    stopped = f"the cells that were measured are in {options.out / 'cells.jsonl'}"
    if status := exit_status(lambda: run(options), "give fewer --samples or --mixtures", stopped):
        sys.exit(status)


if __name__ == "__main__":
    main()
