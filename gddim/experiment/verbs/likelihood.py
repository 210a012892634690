"""The verb `likelihood`: bits per dimension of held-out data."""

from __future__ import annotations

import jax
import numpy as np
from etils import epath

from gddim.errors import require
from gddim.evaluation.likelihood import bits_per_dimension
from gddim.evaluation.page import write_page
from gddim.evaluation.provenance import hardware, software
from gddim.experiment.checkpoints import checkpoint_digest, restore_ema
from gddim.experiment.measure import held_out
from gddim.experiment.outputs import check_names, write_json
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe
from gddim.model import seen_through
from gddim.parallel import batch_sharding, round_up
from gddim.sde.words import process_name


def likelihood(plan: Plan, workdir: epath.Path, step: int | None = None) -> None:
    """Tell the bits per dimension of the first held-out records, as many as an evaluation has samples."""
    experiment, settings = plan.experiment, plan.experiment.sampling
    check_names(workdir, "likelihood")
    require(experiment.eval.samples >= 2, "eval.samples: 1 given, likelihood needs at least 2")
    source = held_out(experiment)
    sde = experiment.through(settings.process)
    t_min = sde.grid_end * sde.horizon / 100  # where samplers stop the data have noise that is too much
    params, step = restore_ema(plan, workdir, step)
    found = bits_per_dimension(
        seen_through(plan.model(params), sde),
        source,
        min(experiment.eval.samples, len(source)),
        settings.seed,
        round_up(settings.batch, plan.mesh.size),
        batch_sharding(plan.mesh),
        t_min=t_min,
    )
    row = {
        "bits_per_dimension": found.mean,
        "standard_error": found.standard_error,
        "records": len(found.each),
        "kind": "exact" if sde.k == 1 and source.dtype != np.uint8 else "upper bound",
        "process": process_name(sde),
        "t_min": t_min,
        "checkpoint": checkpoint_digest(params),
        "experiment": describe(experiment),
        "step": step,
        "devices": hardware(),
        **software(),
    }
    if jax.process_index() == 0:
        origin = {name: row[name] for name in ("step", "checkpoint", "process", "t_min", "records")}
        write_json(workdir / "likelihood.json", row, {"experiment": experiment.name, "seed": settings.seed, **origin})
        write_page(workdir)
        print(
            f"{found.mean:.4f} ± {found.standard_error:.4f} bits per dimension ({row['kind']}) of {len(found.each):,} "
            f"held-out records with the noise of t = {t_min:.3g}, at step {step}; {workdir}: likelihood.json",
            flush=True,
        )
