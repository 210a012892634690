"""`python -m gddim.evaluation stats|fid|report`: statistics of a data set, distances of two, tables of results."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gddim.data import NAMED, ArrayFile, ArraySource, Shards, Source, holds_images, holds_shards, to_uint8, whole_images
from gddim.data.sources import Changed
from gddim.errors import UserError, exit_status, from_extra, harmless, place, printable
from gddim.evaluation.cell import LEAST
from gddim.evaluation.features import FeatureSpace, PixelFeatures, check_numbers
from gddim.evaluation.inception import CONVENTIONS, PRECISIONS, InceptionFeatures
from gddim.evaluation.metrics import Gaussian, frechet_distance
from gddim.evaluation.page import REPORT, check_page, write_page
from gddim.evaluation.report import groups, plot, table
from gddim.evaluation.statistics import FEW, Statistics, check_shapes, compare, npz, source_statistics
from gddim.evaluation.sweep import RESULTS, read_rows
from gddim.parallel import batch_sharding, check_backend, make_mesh
from gddim.storage import check_writable, is_local, write_whole

_SOURCE = (
    f"{', '.join(NAMED)}, each with :test for its held-out part; or the path of a folder or zip of images, of a .npy "
    "or .npz file of samples or a folder of such, or of shards"
)


def main() -> None:
    printable()
    parser = argparse.ArgumentParser("python -m gddim.evaluation", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="stats|fid|report")
    stats = verbs.add_parser("stats", help="write mean, covariance and a subset of SOURCE's features to OUT.npz")
    stats.add_argument("source", metavar="SOURCE", help=_SOURCE)
    stats.add_argument("out", metavar="OUT.npz", help="a new file")
    stats.set_defaults(action=_stats)
    fid = verbs.add_parser("fid", help="print the distances between A and B")
    for name in ("a", "b"):
        fid.add_argument(name, metavar=name.upper(), help=f"{_SOURCE}; or statistics in a .npz file")
    fid.set_defaults(action=_fid)
    for verb in (stats, fid):
        verb.add_argument("--features", choices=("inception", "pixels"), default="inception")
        verb.add_argument("--convention", choices=CONVENTIONS, default=CONVENTIONS[0], help="how images are resized")
        verb.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the Inception network")
        verb.add_argument("--weights", type=Path, help="Inception weights; by default those in the data folder")
        verb.add_argument(
            "--size", type=_size, help="stretch images of a folder to this; by default to those of the first"
        )
    report = verbs.add_parser(
        "report",
        help="write the tables of RESULTS to OUT.md, the plot to OUT.png, .svg and .pdf, and with all else that a run has "
        "left beside RESULTS a page to OUT.html",
    )
    report.add_argument("results", metavar="RESULTS", help="a file of results, or the folder of a run")
    help = "without it, for the folder of a run: its own results.md, results.png, … and report.html"
    report.add_argument("out", metavar="OUT", nargs="?", help=help)
    report.set_defaults(action=_report)
    options = parser.parse_args()

    def act() -> None:
        with from_extra("eval"):
            import PIL  # noqa: F401
            import tqdm  # noqa: F401
        try:
            options.action(options)
        except ValueError as error:  # the metrics refuse too few samples and unlike features
            raise UserError(str(error)) from error

    stopped = "each file is whole, new or as it was" if options.action is _report else "nothing is written"
    if status := exit_status(act, "give a smaller --size, or --features inception", stopped):
        sys.exit(status)


def _stats(options: argparse.Namespace) -> None:
    check_backend()
    out = place(options.out)
    if out.exists() or out.suffix != ".npz":
        raise UserError(f"{out} {'exists' if out.exists() else 'is no .npz file'}: name a new .npz file")
    check_writable(out)
    space = _space(options)
    source = _source(options.source, options.size, space)
    found = source_statistics(source, space, options.source, batch_sharding(make_mesh()))
    found.save(out, mu=found.moments.mean, sigma=found.moments.covariance)  # by the names that pytorch-fid reads
    print(f"{out}: {found.count:,} records of {options.source}, {found.origin['features']}, digest {found.digest()}")
    _tell_deviation(found)


def _fid(options: argparse.Namespace) -> None:
    a, b = _sides(options)
    if not (isinstance(a, Statistics) and isinstance(b, Statistics)):
        a, b = (side.moments if isinstance(side, Statistics) else side for side in (a, b))
        print(f"Fréchet distance {frechet_distance(a, b):.4f} (a file does not tell how its features were taken)")
        return
    found = compare(a, b, ("frechet", "kid", "precision_recall"))
    few = f"; fewer than {FEW:,}: compare only figures of equal counts" if min(a.count, b.count) < FEW else ""
    print(f"Fréchet distance {found['frechet']:.4f} ({a.count:,} and {b.count:,} samples{few})")
    print(f"KID {found['kid']:.6f} ± {found['kid_error']:.6f}")
    print(f"precision {found['precision']:.4f}, recall {found['recall']:.4f}")
    _tell_deviation(a)


def _tell_deviation(found: Statistics) -> None:
    if (share := found.origin.get("deviation_from_float32")) is not None:
        print(f"features in bfloat16 differ by {share:.2%} from those in float32 (root mean square)")


def _sides(options: argparse.Namespace) -> list[Statistics | Gaussian]:
    """Statistics of A and B: as they were saved, the others taken now, in the space of the saved ones or not at all."""
    names = (options.a, options.b)
    saved = [_saved(name) for name in names]
    if None not in saved:
        return [side for side in saved if side]
    check_backend()
    space = _space(options)
    sides = [side or _source(name, options.size, space) for side, name in zip(saved, names, strict=True)]
    for side, other in (sides, sides[::-1]):
        if isinstance(side, Statistics):
            side.check_space(space.name, other.shape if isinstance(other, Source) else None)
        if isinstance(space, PixelFeatures) and isinstance(side, Source) and isinstance(other, Source):
            check_shapes(side.shape, other.shape)
        if isinstance(side, Gaussian) and isinstance(other, Source):
            width = jax.eval_shape(space, other[np.arange(1)]).shape[1]
            if width != len(side.mean):
                raise UserError(f"features of dimension {len(side.mean)} cannot be compared with {space.name}, {width}")
    sharding = batch_sharding(make_mesh())
    return [
        side if isinstance(side, Statistics | Gaussian) else source_statistics(side, space, name, sharding)
        for side, name in zip(sides, names, strict=True)
    ]


def _report(options: argparse.Namespace) -> None:
    results = place(options.results)
    if not results.is_dir() and options.out is None:
        raise UserError("OUT is missing: only what belongs into the folder of a run has a name")
    folder = results if results.is_dir() else results.parent
    out = place(options.out) if options.out else folder / "results"
    page = out.with_name(f"{out.name}.html") if options.out else folder / REPORT
    path = folder / RESULTS if results.is_dir() else results
    rows = read_rows(path) if path.exists() or not (folder / "config.json").exists() else []
    check_writable(out)
    check_page(page)
    written = out.with_name(f"{out.name}.md")
    if written.exists() and not written.read_bytes().startswith(b"## "):
        raise UserError(f"{written} was not written by this program and is not overwritten: move it away")
    if groups(rows) or not results.is_dir():
        plot(rows, out.with_name(f"{out.name}.png"))
        write_whole(written, table(rows).encode())
        print(table(rows))
    write_page(folder, rows, page)
    print(page)


def _space(options: argparse.Namespace) -> FeatureSpace:
    if options.features == "pixels":
        return PixelFeatures()
    return InceptionFeatures.load(options.weights, options.convention, options.precision)


def _size(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} given, a number of pixels of at least 1 is needed")
    return int(text)


def _source(text: str, size: int | None, space: FeatureSpace) -> Source:
    """The records that a word names, floating images rounded as saving them would. Raises `UserError` for records that
    the space or the metrics cannot take.
    """
    source = _records(text, size)
    if len(source) < LEAST:
        raise UserError(f"{text} holds {len(source)} records, the metrics need at least {LEAST}")
    if len(source.shape) == 3 and source.dtype != np.uint8:
        source = Changed(source, lambda x: np.asarray(to_uint8(jnp.asarray(x))), np.dtype(np.uint8))
    check_numbers(space, source.shape)
    if isinstance(space, InceptionFeatures) and (source.dtype != np.uint8 or source.shape[-1] not in (1, 3)):
        raise UserError(
            f"{text} holds {source.dtype} {source.shape}, no images of 1 or 3 channels: use --features pixels"
        )
    return source


def _records(text: str, size: int | None) -> Source:
    name, _, part = text.partition(":")
    if name in NAMED and part in ("", "test"):
        return NAMED[name]().test() if part else NAMED[name]().train()
    path = Path(text).expanduser()
    if not path.exists():
        raise UserError(f"no data set {text}: give {_SOURCE}")
    if path.suffix in (".npy", ".npz"):
        return ArrayFile(str(path), test_every=0).train()
    if holds_shards(path):
        return Shards(str(path)).train()
    files = sorted(file for file in path.glob("*.np[yz]") if not harmless(file.name))
    if files and not holds_images(path):
        return _joined(files)
    return whole_images(path, size)


def _joined(files: Sequence[Path]) -> Source:
    """The records of several files, as --eval.keep-samples writes them."""
    parts = [ArrayFile(str(file), test_every=0).train() for file in files]
    for file, part in zip(files, parts, strict=True):
        if (part.shape, part.dtype) != (parts[0].shape, parts[0].dtype):
            others = f"{parts[0].dtype} {parts[0].shape} as those of {files[0].name}"
            raise UserError(f"{file} holds records {part.dtype} {part.shape}, not {others}: move it elsewhere")
    return ArraySource(np.concatenate([part[np.arange(len(part))] for part in parts]))


def _arrays(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        return npz(path.read_bytes())
    except Exception as error:  # zip, zlib, header and object errors alike
        raise UserError(f"cannot read {path} ({error}): a .npz file of numbers is needed") from error


def _saved(text: str) -> Statistics | Gaussian | None:
    """Statistics from a file of ours, or of pytorch-fid (`mu` and `sigma`); None for anything else."""
    path = place(text)
    if path.suffix != ".npz" or not path.is_file():
        return None
    if is_local(path):  # samples are not read to learn that they are none
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
            if "moments.mean" not in file.files and not {"mu", "sigma"} <= {*file.files}:
                return None
    names = _arrays(path)
    if "moments.mean" in names:
        return Statistics.load(path)
    if not {"mu", "sigma"} <= names.keys():
        return None
    mean, covariance = names["mu"].astype(np.float64), names["sigma"].astype(np.float64)
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise UserError(f"{path}: mu (d,) and sigma (d, d) are needed, not {mean.shape} and {covariance.shape}")
    if not np.abs(covariance - covariance.T).max() <= 1e-6 * np.abs(covariance).max():  # nan is not either
        raise UserError(f"{path}: sigma is not finite and symmetric")
    return Gaussian(mean, covariance)


if __name__ == "__main__":
    main()
