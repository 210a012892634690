"""`python -m gddim.export RUN FILE.safetensors`: a trained network in one file, with a page about it beside it.

RUN is the workdir of a run, or such a file. FILE is read by `gddim.load` and `python -m gddim.generate`; what its arrays are
stands in experiments/weights/README.md. FILE.md beside it tells of the network, with the run's picture and table of it, and
FILE.solvers has the tables that were fitted to it: --sampler table:NAME.

    python -m gddim.export RUN --hub-layout DIR      config.json, model.safetensors and README.md, as hubs have them
    python -m gddim.export RUN --stablehlo FILE      a sampler as one program for CPU, CUDA and TPU, without this package:
                                                     jax.export.deserialize(bytes).call(seeds), of seeds (b,) uint32
    python -m gddim.export RUN DIR --state           what the run needs to go on elsewhere: parameters in float16, each average
                                                     and moment in 8 bits, in files of at most 16 MB (train.init)
Nothing that is there is overwritten.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable

from etils import epath

from gddim.errors import UserError, exit_status, from_extra, place, printable
from gddim.experiment.trained import HUB, find, tables_of
from gddim.export.card import card, front_matter, picture, results, tables
from gddim.export.model import exported, portable
from gddim.export.state import MOMENTS, export_state
from gddim.loading import loaded
from gddim.parallel import check_backend
from gddim.sde.base import positions
from gddim.storage import all_or_none, check_empty, write_whole
from gddim.weights import DTYPES, encode

SUFFIX = ".safetensors"


def main(arguments: list[str] | None = None) -> int:
    printable()
    options = _parser().parse_args(arguments)

    def write() -> None:
        _check(options)
        check_backend()
        for line in (_state if options.state else _model)(options):
            print(line)

    return exit_status(write, "beside a training, JAX_PLATFORMS=cpu takes the host's", "nothing is written")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m gddim.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="workdir of a run, or an exported file")
    parser.add_argument(
        "out", metavar="FILE.safetensors|DIR", nargs="?", help="a new file; with --state a new or empty folder"
    )
    parser.add_argument("--hub-layout", metavar="DIR", help="a new or empty folder")
    parser.add_argument("--stablehlo", metavar="FILE", help="a new file")
    parser.add_argument("--step", type=int, help="of the checkpoint (the newest)")
    parser.add_argument("--weights", help="ema, raw or a length σ_rel (what the run samples with)")
    parser.add_argument("--dtype", choices=DTYPES, help="in which the parameters are kept (float32)")
    parser.add_argument("--licence", help="of the weights, as apache-2.0; told in the file and its page")
    parser.add_argument("--note", help="a sentence for the page, as on what it was trained and for how long")
    parser.add_argument("--sampler", help="of --stablehlo, as gddim:3:data (that of the run)")
    parser.add_argument("--process", help="of --stablehlo, as cld (that of the run)")
    parser.add_argument("--nfe", type=int, help="network calls of --stablehlo (those of the run)")
    parser.add_argument("--state", action="store_true", help="the state, to go on with")
    parser.add_argument("--moments", choices=MOMENTS, help="of --state, Adam's: each is a byte a parameter (both)")
    parser.add_argument(
        "--room", type=float, metavar="MB", help="of --state: as many of the moments as fit in so many MB"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise `UserError` for an option that nothing which is asked for hears of."""
    if options.state and (options.out is None or options.hub_layout or options.stablehlo):
        raise UserError("--state is written to a folder of its own: python -m gddim.export RUN DIR --state")
    if not (options.out or options.hub_layout or options.stablehlo):
        raise UserError(f"give FILE{SUFFIX}, --hub-layout DIR or --stablehlo FILE")
    for names, heard, of in (
        (("weights",), not options.state, f"FILE{SUFFIX}, --hub-layout and --stablehlo: a state has all averages"),
        (("dtype", "licence", "note"), not options.state and (options.out or options.hub_layout),
         f"FILE{SUFFIX} and --hub-layout"),
        (("sampler", "process", "nfe"), options.stablehlo, "--stablehlo, the program that draws samples"),
        (("moments", "room"), options.state, "--state, the folder to go on with"),
    ):  # fmt: skip
        for name in names:
            if getattr(options, name) is not None and not heard:
                raise UserError(f"--{name} is of {of}")


def _state(options: argparse.Namespace) -> list[str]:
    folder = place(options.out)
    room = math.inf if options.room is None else options.room
    packed = export_state(place(options.run), folder, options.moments, options.step, room)
    count, sizes = packed.vectors["model"].size, [path.stat().length for path in folder.iterdir()]
    told = f"{folder}: step {packed.step}, {count:,} parameters in {len(sizes)} file(s), {sum(sizes):,} bytes"
    return [f"{told}; to go on: --train.init {folder} with the options of the run and a new --workdir"]


def _model(options: argparse.Namespace) -> list[str]:
    """Write what was asked for, once it is known that all of it can be."""
    run, file, hub, program = (
        None if path is None else place(path)
        for path in (options.run, options.out, options.hub_layout, options.stablehlo)
    )
    assert run is not None
    if file is not None and file.suffix != SUFFIX:
        raise UserError(f"{file} must end with {SUFFIX}; a folder is for --state or --hub-layout")
    beside = [] if file is None else [file, file.with_suffix(".md"), file.with_suffix(".png"), tables_of(file)]
    new = [*beside, *([] if program is None else [program])]
    for path in new:
        if path.exists():
            raise UserError(f"{path} is there already, and is not overwritten: name another file")
    if hub is not None:
        check_empty(hub)
    how = {name: getattr(options, name) for name in ("sampler", "process", "nfe") if getattr(options, name) is not None}
    found = find(run, options.step, options.weights)
    model = loaded(found)
    if program is not None:
        model.through(**how)  # what cannot be is refused before anything is written
        with from_extra("eval"):
            import flatbuffers  # noqa: F401
    weights, lines = exported(found, options.dtype or "float32", options.licence or ""), []
    about = f"step {weights.about['step']}, {weights.about['parameters']:,} parameters in {weights.about['dtype']}"
    fitted = tables(epath.Path(found.tables), weights)
    content, image = encode(weights), picture(run, weights)
    own = bool(positions(found.experiment.sde))
    page = functools.partial(card, weights, results=results(run, weights), note=options.note or "", own=own)
    if hub is not None:
        new += [*(hub / name for name in ("config.json", HUB, "README.md", "samples.png")), tables_of(hub)]
    with all_or_none(*new):  # so that the same command may be tried again
        if file is not None:
            _with_page(file, file.with_suffix(".md"), file.with_suffix(".png"), "", content, page, image)
            _with_tables(tables_of(file), fitted)
            lines.append(f"{file}: {about}, {len(content):,} bytes; {file.with_suffix('.md').name} tells of it")
        if hub is not None:
            head = front_matter(weights)
            write_whole(hub / "config.json", (json.dumps(weights.config, indent=2) + "\n").encode())
            _with_page(hub / HUB, hub / "README.md", hub / "samples.png", head, content, page, image)
            _with_tables(tables_of(hub), fitted)
            lines.append(f"{hub}: {about}, as a hub's repository")
        if program is not None:
            write_whole(program, portable(model, **how))
            lines.append(
                f"{program}: a sampler; jax.export.deserialize(bytes).call(seeds), of seeds (b,) uint32, runs it"
            )
    return lines


def _with_tables(folder: epath.Path, fitted: list[epath.Path]) -> None:
    for path in fitted:
        write_whole(folder / path.name, path.read_bytes())


def _with_page(
    file: epath.Path, about: epath.Path, copy: epath.Path, head: str, content: bytes, page: Callable[[str, str | None], str],
    image: epath.Path | None,
) -> None:  # fmt: skip
    """The file, and the page about it with its picture beside it."""
    write_whole(file, content)
    if image:
        write_whole(copy, image.read_bytes())
    write_whole(about, (head + page(file.name, image and copy.name)).encode())
