"""python -m experiments.solvers.tune [--process vp] [--nfe 5 6 8 10 15 20]: the times of few steps, learned on mixtures.

How `tuned_grid` was found, and how it may be bettered. For each number of calls the times of `gddim:3:data:free` descend by
Adam, through the sampler itself, from those of `tuned_grid` (those of `band_grid` at first) on mixtures of all kinds: least
is the mean over mixtures of the mean logarithm of a sample's error, and of a share of the logarithm of their root mean
square. It prints the shares of the way in the clock of the band at which the times lie, and what is gained over
`tuned_grid` on these mixtures and on others.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gddim
from experiments.solvers.__main__ import PROCESSES, T_MIN, Problem, errors, problem, typical
from experiments.solvers.mixtures import DATA_STD, KINDS
from gddim.errors import printable
from gddim.samplers.base import Coefficients
from gddim.samplers.fit import Family, beside
from gddim.samplers.grids import BAND, Band
from gddim.samplers.solver import TableSolver
from gddim.sde.linalg import Array

ANCHOR = 4  # steps of Adam for which a table is taken as linear in its times


@eqx.filter_jit
def descent(
    anchor: Coefficients, slopes: Coefficients, moved: Array, problem: Problem, rms: Array
) -> tuple[Array, Array]:
    """The loss of a problem, and its gradient by how far the gaps are moved from the anchor."""

    def loss(moved: Array) -> Array:
        solver = TableSolver.of(beside(anchor, slopes, moved), problem.sde)
        found = jnp.log(errors(solver, problem) + 1e-12)
        return jnp.mean(found.mean(-1) + rms * jax.nn.logsumexp(2 * found, -1, b=1 / found.shape[-1]) / 2)

    return jax.value_and_grad(loss)(moved)


def tuned(family: Family, gaps: np.ndarray, problems: Sequence[Problem], steps: int, rms: float) -> np.ndarray:
    """The best gaps that `steps` of Adam meet."""
    adam = optax.adam(optax.cosine_decay_schedule(0.03, steps))
    state, best = adam.init(jnp.asarray(gaps)), (np.inf, gaps)
    for step in range(steps):
        if step % ANCHOR == 0:
            at, anchor, slopes = gaps, family.table(family.times(gaps)), family.slopes(gaps)
        found = [descent(anchor, slopes, jnp.asarray(gaps - at), each, jnp.asarray(rms)) for each in problems]
        value, slope = (np.mean([np.asarray(x) for x in part], 0) for part in zip(*found, strict=True))
        if value < best[0]:
            best = float(value), gaps
        change, state = adam.update(jnp.asarray(slope / max(1.0, np.linalg.norm(slope))), state)
        gaps = gaps + np.asarray(change)
    return best[1]


def gained(family: Family, grids: Sequence[np.ndarray], problems: Sequence[Problem]) -> str:
    """Median and root mean square error on the second grid over those on the first: geometric means over mixtures."""
    first, second = (np.log(typical(TableSolver.of(family.table(grid), family.sde), problems)) for grid in grids)
    return " and ".join(f"{ratio:.3f}" for ratio in np.exp(np.mean(second - first, -1)))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    printable()
    parser = argparse.ArgumentParser("python -m experiments.solvers.tune", description=__doc__)
    parser.add_argument("--process", choices=PROCESSES, default="vp")
    parser.add_argument("--nfe", type=int, nargs="+", default=(5, 6, 8, 10, 15, 20))
    parser.add_argument("--mixtures", type=int, default=12, help="of each kind (12); others, a third as many, judge")
    parser.add_argument("--samples", type=int, default=16, help="from each (16)")
    parser.add_argument("--steps", type=int, default=120, help="of Adam (120)")
    parser.add_argument("--rms", type=float, default=0.3, help="weight of their root mean square (0.3)")
    parser.add_argument("--seed", type=int, default=7000, help="of the first mixture (7000)")
    options = parser.parse_args(argv)
    if min(options.mixtures, options.samples, options.steps, *options.nfe) < 1:
        parser.error("--nfe, --mixtures, --samples and --steps must be at least 1")
    sde, own = PROCESSES[options.process], options.seed + np.arange(options.mixtures)
    others = own[-1] + 1 + np.arange(-(-options.mixtures // 3))
    with jax.enable_x64(True):
        learn = [problem(sde, kind, own.tolist(), options.samples) for kind in KINDS]
        judge = [problem(sde, kind, others.tolist(), 3 * options.samples) for kind in KINDS]
        sampler = gddim.GDDIM(3, interpolate="data", corrector="free")
        t_min = T_MIN * sde.horizon
        family = Family(sampler, sde, sde.horizon, t_min, Band.of(DATA_STD, *BAND))
        for calls in options.nfe:
            began = time.perf_counter()
            default = gddim.tuned_grid(sde, sde.horizon, t_min, calls, DATA_STD)
            gaps = tuned(family, family.gaps(default), learn, options.steps, options.rms)
            shares = np.cumsum(np.exp(gaps - gaps.max()))
            grid = family.times(gaps)
            told = [gained(family, (default, grid), problems) for problems in (learn, judge)]
            print(f"{calls}: {', '.join(f'{x:.4f}' for x in (shares / shares[-1])[:-1])}")
            print(f"   errors, median and rms: {told[0]} here, {told[1]} on others", flush=True)
            print(f"   {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
