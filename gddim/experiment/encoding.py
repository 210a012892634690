"""The verbs that go from data to noise: `likelihood` and `encode`."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int, Key

from gddim.data import Source, data_alone, to_unit
from gddim.errors import UserError
from gddim.evaluation.figures import label_in_words
from gddim.evaluation.latents import Coder, interpolate, reconstruct
from gddim.evaluation.likelihood import bits_per_dimension
from gddim.evaluation.page import REPORT, check_page, write_page
from gddim.evaluation.provenance import hardware, software
from gddim.evaluation.samplers import sampler_name
from gddim.evaluation.statistics import to_host, write_whole
from gddim.experiment.config import Experiment, require
from gddim.experiment.drawing import grid
from gddim.experiment.measure import checkpoint_digest
from gddim.experiment.outputs import check_names, write_figure, write_npz
from gddim.experiment.pictures import gallery, rows
from gddim.experiment.plan import Plan
from gddim.experiment.training import restore_ema
from gddim.experiment.workdir import describe
from gddim.parallel import batch_sharding
from gddim.samplers import GDDIM

ROWS, COLUMNS = 8, 9  # of the picture of interpolations


def likelihood(plan: Plan, workdir: epath.Path, step: int | None = None) -> None:
    """Tell the bits per dimension of the first held-out records, as many as an evaluation has samples."""
    experiment, settings = plan.experiment, plan.experiment.sampling
    check_page(workdir / REPORT)
    source = _held_out(experiment)
    params, step = restore_ema(plan, workdir, step)
    found = bits_per_dimension(
        plan.model(params),
        source,
        min(experiment.eval.samples, len(source)),
        settings.seed,
        -(-settings.batch // plan.mesh.size) * plan.mesh.size,
        batch_sharding(plan.mesh),
    )
    row = {
        "bits_per_dimension": found.mean,
        "standard_error": found.standard_error,
        "records": len(found.each),
        "kind": "exact" if experiment.sde.k == 1 and source.dtype != np.uint8 else "upper bound",
        "checkpoint": checkpoint_digest(params),
        "experiment": describe(experiment),
        "step": step,
        "devices": hardware(),
        **software(),
    }
    if jax.process_index() == 0:
        write_whole(workdir / "likelihood.json", (json.dumps(row, indent=2) + "\n").encode())
        write_page(workdir)
        print(
            f"{found.mean:.4f} ± {found.standard_error:.4f} bits per dimension ({row['kind']}) of {len(found.each):,} "
            f"held-out records at step {step}; {workdir}: likelihood.json",
            flush=True,
        )


def encode(plan: Plan, workdir: epath.Path, step: int | None = None) -> None:
    """Bring the first held-out records to their latents and back; writes both, and pictures of what lies between."""
    experiment, settings = plan.experiment, plan.experiment.sampling
    sampler = settings.sampler
    if not isinstance(sampler, GDDIM) or sampler.lam > 0 or sampler.corrector:
        raise UserError("encode: it needs the coefficients of gddim[:ORDER], without noise and corrector")
    if settings.samples < 2:
        raise UserError("sampling.samples: 1 given, encode shows what lies between pairs and needs at least 2")
    check_names(workdir, "latents", "reconstructions", "interpolations")
    source = _held_out(experiment)
    params, step = restore_ema(plan, workdir, step)
    count = min(settings.samples, len(source))
    size = -(-min(settings.batch, count) // plan.mesh.size) * plan.mesh.size
    coder = Coder.of(plan.model(params), grid(experiment, settings), sampler.order)
    parts = []
    for first in range(0, count, size):
        numbers = np.minimum(np.arange(first, first + size), count - 1)
        x, numbers = jax.device_put((source[numbers], numbers), batch_sharding(plan.mesh))
        parts.append(jax.tree.map(to_host, reconstruct(coder, to_unit(x), _keys(settings.seed, numbers))))
    latents, data, errors = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    shown = min(ROWS, count // 2)
    ends = to_unit(jnp.asarray(source[np.arange(2 * shown)]))
    between = interpolate(coder, ends[:shown], ends[shown:], COLUMNS, _keys(settings.seed, jnp.arange(shown)))
    if jax.process_index() == 0:
        made = dataclasses.replace(settings, sampler=GDDIM(sampler.order))  # whichever prediction samples
        origin = {"experiment": experiment.name, "step": step, **describe(made)}
        run = f"{experiment.name}, step {step}: held-out data"
        by = f"{label_in_words(sampler_name(made.sampler))}, {len(coder.up.time)} network calls each way"
        write_npz(workdir / "latents.npz", latents, origin)
        pairs, title = np.stack([np.asarray(ends), data[: 2 * shown]]), f"{run}, encoded and decoded\n{by}"
        back = rows(pairs, title, ("data", "decoded")) if data.ndim == 4 else gallery(data, title)
        write_figure(workdir / "reconstructions", back, origin)
        title = f"{run}, and what lies between their latents\n{by}"
        write_figure(workdir / "interpolations", rows(to_host(between), title), origin)
        write_page(workdir)
        print(
            f"{count:,} held-out records encoded and decoded in {len(coder.up.time)} calls each way at step {step}: root "
            f"mean square error {errors.mean():.4g}, at most {errors.max():.4g}; {workdir}: latents.npz, "
            "reconstructions.png, interpolations.png, report.html",
            flush=True,
        )


def _held_out(experiment: Experiment) -> Source:
    """The held-out records. Raises `UserError` for a single one: neither verb has anything to say of it."""
    source = data_alone(experiment.data.test())
    require(len(source) >= 2, f"{len(source)} records are held out, likelihood and encode need at least 2")
    return source


@functools.partial(jax.jit, static_argnums=0)
def _keys(seed: int, numbers: Int[Array, " n"]) -> Key[Array, " n"]:
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(numbers)
