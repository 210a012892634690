"""The verb `encode`: held-out data to their latents and back."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int, Key, Shaped

from gddim.data import DATA, LABEL, ArraySource, Source, classes_of, to_unit, x0_and_cond
from gddim.errors import UserError, require
from gddim.evaluation.figures import label_in_words
from gddim.evaluation.page import write_page
from gddim.experiment.checkpoints import restore_ema
from gddim.experiment.config import Experiment
from gddim.experiment.drawing import numbered_batches
from gddim.experiment.measure import held_out
from gddim.experiment.outputs import check_names, digest_of_data, origin_of_network, write_figure, write_npz
from gddim.experiment.pictures import gallery, rows
from gddim.experiment.plan import Plan
from gddim.model import seen_through
from gddim.parallel import to_host
from gddim.samplers import GDDIM, OnGrid
from gddim.samplers.inversion import Coder, interpolate, reconstruct
from gddim.samplers.words import laid_out, sampler_name, steps_for

ROWS, COLUMNS = 8, 9  # of the picture of interpolations


def encode(
    plan: Plan, workdir: epath.Path, step: int | None = None, given: Shaped[np.ndarray, "n ..."] | None = None
) -> None:
    """Bring the first held-out records, or those given, to their latents and back; writes both, and pictures of what lies
    between. Of classes those given are of `sampling.classes` in turn, or of none.
    """
    experiment, settings = plan.experiment, plan.experiment.sampling
    drawn = laid_out(settings.sampler, settings.grid, settings.power)
    if isinstance(drawn, OnGrid):
        drawn, settings = drawn.sampler, dataclasses.replace(settings, grid=drawn.grid, power=None)
    match drawn:
        case GDDIM(order=order, lam=0.0, corrector=False | "free", data_std=std):
            sampler = GDDIM(order, data_std=std)  # whichever prediction samples
        case _:
            raise UserError("encode: it needs the coefficients of gddim[:ORDER], without noise and corrector")
    if settings.samples < 2:
        raise UserError("sampling.samples: 1 given, encode shows what lies between pairs and needs at least 2")
    check_names(workdir, "latents", "reconstructions", "interpolations")
    source = held_out(experiment) if given is None else _source(experiment, given)
    which = "held-out" if given is None else "given"
    count = min(settings.samples, len(source))
    sde = experiment.through(settings.process)
    settings = dataclasses.replace(settings, sampler=sampler)
    grid = settings.flow_grid(sde, experiment.data.shape, steps_for(sampler, settings.nfe, settings.last))
    params, step = restore_ema(plan, workdir, step)
    coder = Coder.of(seen_through(plan.model(params), sde), grid, order)
    parts = []
    for numbers, records in numbered_batches(plan.mesh, count, settings.batch, source[np.arange(count)]):
        x, cond = x0_and_cond(records)
        parts.append(jax.tree.map(to_host, reconstruct(coder, to_unit(x), _keys(settings.seed, numbers), cond)))
    latents, data, errors = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    origin = origin_of_network(experiment, step, params, settings)
    origin |= {} if given is None else {"given": digest_of_data(given)}
    if jax.process_index() == 0:
        write_npz(workdir / "latents.npz", latents, origin)
    shown = min(ROWS, count // 2)
    ends, cond = x0_and_cond(jax.tree.map(jnp.asarray, source[np.arange(2 * shown)]))
    ends, keys = to_unit(ends), _keys(settings.seed, jnp.arange(shown))
    conds = [jax.tree.map(lambda x, part=part: x[part], cond) for part in (slice(shown), slice(shown, None))]
    between = to_host(interpolate(coder, ends[:shown], ends[shown:], COLUMNS, keys, (conds[0], conds[1])))
    if jax.process_index() == 0:
        run = f"{experiment.name}, step {step}: {which} data"
        by = f"{label_in_words(sampler_name(sampler))}, {coder.nfe} network calls each way"
        pairs, title = np.stack([np.asarray(ends), data[: 2 * shown]]), f"{run}, encoded and decoded\n{by}"
        back = rows(pairs, title, ("data", "decoded")) if data.ndim == 4 else gallery(data, title)
        write_figure(workdir / "reconstructions", back, origin)
        title = f"{run}, and what lies between their latents\n{by}"
        write_figure(workdir / "interpolations", rows(between, title), origin)
        write_page(workdir)
        print(
            f"{count:,} {which} records encoded and decoded in {coder.nfe} calls each way at step {step}: root "
            f"mean square error {errors.mean():.4g}, at most {errors.max():.4g}; {workdir}: latents.npz, "
            "reconstructions.png, interpolations.png, report.html",
            flush=True,
        )


def _source(experiment: Experiment, given: Shaped[np.ndarray, "n ..."]) -> Source:
    require(
        len(given) > 1, f"{len(given)} records are given, encode needs at least 2: it shows what lies between pairs"
    )
    classes, settings = classes_of(experiment.data), experiment.sampling
    if not classes:
        return ArraySource(given)
    experiment.drawn_classes(settings)  # what cannot be asked
    asked = settings.class_of(np.arange(len(given)), classes) if settings.classes else np.full(len(given), -1)
    return ArraySource({DATA: given, LABEL: np.asarray(asked, np.int32)})


@functools.partial(jax.jit, static_argnums=0)
def _keys(seed: int, numbers: Int[Array, " n"]) -> Key[Array, " n"]:
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(numbers)
