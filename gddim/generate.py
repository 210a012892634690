"""`python -m gddim.generate FILE_OR_RUN OUT`: pictures of what a network draws, a PNG for each seed, and all in a grid.

FILE_OR_RUN is the workdir of a run, a file of python -m gddim.export, or a folder as hubs have them; neither the experiment's
file nor its data are needed. What a seed makes follows from the parameters, the process, the sampler, its calls and the size
of the batch alone: OUT/000007.png is the same whatever other seeds were asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from gddim.data import to_uint8
from gddim.errors import UserError, exit_status, from_extra, place, printable, progress
from gddim.evaluation.figures import KEY, encode, label_in_words
from gddim.experiment.pictures import gallery
from gddim.experiment.sampling import Guide
from gddim.experiment.trained import find
from gddim.guidance import Autoguidance
from gddim.loading import loaded
from gddim.parallel import check_backend, make_mesh, round_up, to_host
from gddim.samplers.solver import TableSolver
from gddim.samplers.words import sampler_name
from gddim.sde.words import process_name
from gddim.storage import check_empty, write_whole

MOST = 10_000  # pictures that a grid shows


def parse_numbers(option: str, words: list[str], least: int = 0) -> list[int]:
    """The numbers of `0-63`, `1,5,9` or `0-3,7`. Raises `UserError` for anything else."""
    found: list[int] = []
    for part in ",".join(words).split(","):
        if not (ends := re.fullmatch(r"(-?\d+)(?:-(\d+))?", part.strip())):
            raise UserError(f"{option} {' '.join(words)}: accepted are numbers and ranges of them, as 0-63 or 1,5,9")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not least <= first <= last < 2**31 or last - first >= 10**7:
            raise UserError(f"{option} {part}: a range rises, within {least} … {2**31 - 1}, by less than ten million")
        found += range(first, last + 1)
    return found


def main(arguments: list[str] | None = None) -> int:
    printable()
    parser = argparse.ArgumentParser(
        "python -m gddim.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("source", metavar="FILE_OR_RUN", help="a trained network, local or gs://…")
    parser.add_argument("out", metavar="OUT", nargs="?", help="a new or empty folder")
    parser.add_argument("--seeds", default="0-63", help="numbers and ranges, as 0-63 or 1,5,9 (0-63)")
    parser.add_argument("--classes", nargs="+", help="of the seeds in turn, as 3 5 or 0-9; none is -1 (all)")
    parser.add_argument("--process", help="to draw through, as vp, cld:gamma=0.1 (that of the run)")
    parser.add_argument("--sampler", help="as gddim:3:data, em, heun, table:NAME (that of the run)")
    parser.add_argument("--nfe", type=int, help="network calls a sample (those of the run)")
    parser.add_argument("--step", type=int, help="of the checkpoint (the newest)")
    for field in dataclasses.fields(Guide):
        kind = {"interval": {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}, "checkpoint": {"type": int}}
        text = "guidance, as the option of the same name of an experiment's sample"
        parser.add_argument(f"--guide.{field.name}", **kind.get(field.name, {"type": float}), help=text)
    parser.add_argument("--weights", help="ema, raw or a length σ_rel (what the run samples with)")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time, over all devices (16)")
    options = parser.parse_intermixed_args(arguments)
    if options.out is None and len(options.classes or ()) > 1:  # --classes 3 5 OUT
        *options.classes, options.out = options.classes
    if options.out is None or re.fullmatch(r"-?\d+", options.out):
        parser.error("the following arguments are required: OUT, a folder, not a number")

    def draw() -> None:
        check_backend()
        print(_generate(options))

    return exit_status(draw, "give a smaller --batch", "the pictures that are there are whole")


def _generate(options: argparse.Namespace) -> str:
    seeds, out = list(dict.fromkeys(parse_numbers("--seeds", [options.seeds]))), place(options.out)
    if options.batch < 1:
        raise UserError(f"--batch must be at least 1, not {options.batch}")
    check_empty(out)
    with from_extra("eval"):
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    mesh = make_mesh()
    found = find(place(options.source), options.step, options.weights, mesh=mesh)
    shape, settings = tuple(found.experiment.data.shape), found.experiment.sampling
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise UserError(
            f"{options.source} draws records {shape}, no pictures: gddim.load and .sample give them as arrays"
        )
    if options.classes:
        classes = tuple(parse_numbers("--classes", options.classes, -1))
        settings = dataclasses.replace(settings, classes=classes, per_class=0)
        found.experiment.drawn_classes(settings)  # which refuses those that the data have not
    how = {name: getattr(options, name) for name in ("sampler", "process", "nfe") if getattr(options, name) is not None}
    given: dict[str, Any] = {field.name: getattr(options, f"guide.{field.name}") for field in dataclasses.fields(Guide)}
    if given := {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None}:
        own = Guide() if given.get("scale") == 1 else settings.guide
        if {"checkpoint", "ema"} & given.keys():
            own = dataclasses.replace(own, checkpoint=None, ema=0.0)  # another worse network than the run's
        settings = dataclasses.replace(settings, guide=dataclasses.replace(own, **given))
        settings.guide.check()
    if (guide := settings.guide).by_worse:
        step = options.step if guide.checkpoint is None else guide.checkpoint
        worse = find(place(options.source), step, guide.ema or "ema", mesh=mesh).model
        away = guide.away_from(worse)
        how["guide"] = lambda D: Autoguidance(D, worse.denoiser, away.scale, away.interval)
    model = dataclasses.replace(loaded(found, mesh), settings=settings)
    through, solver = model.through(**how)
    told = {
        "name": found.experiment.name,
        "checkpoint": found.about.get("checkpoint"),
        "step": found.about.get("step"),
        "process": process_name(through.sde),
        "sampler": how.get("sampler")
        or sampler_name(settings.through(through.sde, found.model.sde).method(through.sde, model.shape).sampler),
        "nfe": how.get("nfe") or (solver.nfe if isinstance(solver, TableSolver) else settings.nfe),
        **({"guide": str(guide)} if guide.acts else {}),
    }
    size = round_up(options.batch, mesh.size)  # always so many, for a program of another size rounds otherwise
    draw = jax.jit(lambda model, seeds: to_uint8(model.sample_seeds(seeds, **how)))
    drawn = []
    for first in progress(range(0, len(seeds), size), unit="batch"):
        some = seeds[first : first + size]
        images = to_host(draw(model, jnp.asarray(np.resize(some, size), jnp.uint32)))[: len(some)]
        for seed, image in zip(some, images, strict=True):
            of = {"class": int(settings.class_of(seed, found.classes))} if found.classes else {}
            write_whole(out / f"{seed:06d}.png", _png(image, told | of | {"seed": seed}))
        drawn.append(images[: max(0, MOST - first)])
    by = f"{label_in_words(told['sampler'])}, {told['process']}, at most {told['nfe']} network calls"
    by += f", guided by {guide}" if guide.acts else ""
    title = f"{told['name']}, step {told['step']}, seeds {options.seeds}\n{by}"
    grid = gallery(np.concatenate(drawn), title)
    write_whole(out / "grid.png", encode(grid, ".png", json.dumps(told | {"seeds": seeds[:MOST]})))
    return f"{out}: {len(seeds)} pictures by {by}; grid.png shows them"


def _png(image: UInt8[np.ndarray, "h w c"], told: dict[str, Any]) -> bytes:
    from PIL import Image, PngImagePlugin

    about, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_itxt(KEY, json.dumps(told))
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
