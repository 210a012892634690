"""The verb `fit`: a table for few network calls, learned from a run of many."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Int, Key

from gddim.data import LABEL, classes_of
from gddim.errors import progress
from gddim.evaluation.provenance import hardware, software
from gddim.experiment.checkpoints import checkpoint_digest, restore_ema
from gddim.experiment.drawing import numbered_batches
from gddim.experiment.fitting import Problem
from gddim.experiment.plan import Plan
from gddim.model import seen_through
from gddim.parallel import agree, batch_sharding, round_up, to_host
from gddim.samplers.fit import Pairs, fit
from gddim.samplers.learned import encode
from gddim.samplers.numbered import sample_numbered, start
from gddim.samplers.solver import TableSolver
from gddim.samplers.words import sampler_name
from gddim.sde import AbstractLinearSDE
from gddim.sde.words import process_name
from gddim.storage import write_whole

APART = 2**31
"""Added to the seed: samples are drawn with seeds below, so that none has a noise that a table was fitted to."""


def fit_table(plan: Plan, workdir: epath.Path, problem: Problem, step: int | None = None) -> None:
    """Fit the table of a checkpoint's averaged model, for the process and calls of sampling; writes solvers/NAME.npz."""
    began = time.perf_counter()
    experiment, settings = plan.experiment, plan.experiment.fit
    params, step = restore_ema(plan, workdir, step)
    sde, shape = problem.family.sde, tuple(experiment.data.shape)
    model, teacher = seen_through(plan.model(params), sde), problem.teacher.solver(sde)
    assert isinstance(teacher, TableSolver)
    size, sharding = round_up(settings.batch, plan.mesh.size), batch_sharding(plan.mesh)
    classes = classes_of(experiment.data)
    key = jax.random.key(np.uint32(APART + experiment.sampling.seed))
    held_out, count = round_up(settings.held_out, size), round_up(settings.pairs, size)
    n = held_out + count
    of = {LABEL: np.asarray(experiment.sampling.class_of(np.arange(n), classes))} if classes else None
    parts: list[Pairs] = []
    path: Any = None
    theirs = n // size * problem.teacher.nfe
    total = theirs + 3 * settings.steps * len(problem.grid)
    with progress(total=total, unit="call") as bar:
        bar.set_description("the teacher")
        for numbers, cond in numbered_batches(plan.mesh, n, size, of):
            found = sample_numbered(model, teacher, shape, key, numbers, path=True, cond=cond)
            parts.append(
                Pairs(to_host(_starts(sde, shape, key, numbers)), to_host(found.data), jax.tree.map(to_host, cond))
            )
            assert found.path is not None
            path = path or (to_host(found.path.times), to_host(found.path.foreseen)[..., 0, :])
            bar.update(problem.teacher.nfe)
        pairs = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        held, train = (
            jax.tree.map(lambda x, rows=rows: x[rows], pairs) for rows in (slice(held_out), slice(held_out, None))
        )

        def told(steps: int, loss: float) -> None:
            bar.set_description(f"step {steps}, loss {loss:.3g}")
            bar.update(max(0, theirs + 3 * steps * len(problem.grid) - bar.n))

        clock = lambda: float(agree(time.perf_counter() - began))
        left = 60 * settings.minutes - clock()
        put = lambda pairs: jax.device_put(pairs, sharding)
        path = np.append(path[0], problem.grid[-1]).astype(np.float64), path[1]
        path[0][0] = problem.grid[0]
        found = fit(
            model, problem.family, problem.grid, path, train, held, settings.steps, size, left, clock, put, told
        )
    about = {
        "experiment": experiment.name,
        "network": checkpoint_digest(params),
        "step": step,
        "process": process_name(sde),
        "nfe": len(problem.grid) - 1,
        "from": sampler_name(problem.teacher.sampler),
        "teacher": problem.teacher.nfe,
        "seed": APART + experiment.sampling.seed,
        "pairs": count,
        "held_out": held_out,
        "steps": found.steps,
        "loss": {"before": found.default, "grid": found.grid, "fitted": found.fitted},
        "seconds": time.perf_counter() - began,
        "devices": hardware(),
        **software(),
    }
    if jax.process_index() == 0:
        write_whole(problem.file, encode(found.table, about))
        print(
            f"{problem.file}: {about['nfe']} calls through {about['process']}, fitted to {settings.teacher} in "
            f"{about['seconds']:.0f} s: mean square distance {found.default:.3g} before, {found.grid:.3g} by its grid, "
            f"{found.fitted:.3g} after {found.steps} steps; --sampler table:{problem.file} --sampling.nfe {about['nfe']}",
            flush=True,
        )


def _starts(sde: AbstractLinearSDE, shape: tuple[int, ...], key: Key[Array, ""], numbers: Int[Array, " b"]) -> Array:
    return jax.jit(jax.vmap(lambda i: start(sde, shape, key, i)[0]))(numbers)
