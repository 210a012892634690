"""`python -m gddim.data prepare|std`: shards of a data set, and the standard deviation that the Denoiser wants."""

import argparse
import dataclasses
import io
import sys
from pathlib import Path

import numpy as np

from gddim.data import NAMED, ArrayFile, Dataset, ImageFolder, Shards, holds_shards
from gddim.data.moments import moments, spectrum
from gddim.data.shards import prepare
from gddim.errors import UserError, exit_status, place, printable
from gddim.storage import check_writable, is_local, write_whole

_OPTIONS = {
    "root": dict(metavar="DIR", help="for cifar10, svhn, celeba: folder that holds the data"),
    "size": dict(type=int, metavar="PIXELS", help="for image files and celeba: height and width to resize to"),
    "channels": dict(type=int, metavar="N", help="for image files: 1 grey, 3 colour (default); 2, 4 with alpha"),
    "flip": dict(action="store_true", default=None, help="a mirrored image is as good as the image"),
    "skip_damaged": dict(action="store_true", default=None, help="go on without the image files that cannot be read"),
    "labels": dict(action="store_true", default=None, help="with the classes of records, where they have them"),
    "test_every": dict(type=int, metavar="N", help="hold out every N-th record (default 10); 0: none, and test on all"),
}
_SOURCE = f"{', '.join(NAMED)}, or the path of a folder or zip of images, of a .npy or .npz file, or of shards"


def _dataset(options: argparse.Namespace) -> Dataset:
    path = Path(options.source).expanduser()
    given = {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
    if options.source in NAMED:
        kind = NAMED[options.source]
    elif not path.exists():
        raise UserError(f"no data set {options.source}: give {_SOURCE}")
    else:
        arrays = path.suffix in (".npy", ".npz")
        kind = ArrayFile if arrays else Shards if holds_shards(path) else ImageFolder
        given["path"] = options.source
    accepted = {field.name for field in dataclasses.fields(kind)}
    if wrong := [_option(name) for name in given if name not in accepted]:
        takes = ", ".join(_option(name) for name in _OPTIONS if name in accepted)
        raise UserError(f"{wrong[0]} says nothing about {options.source}, which takes {takes or 'no options'}")
    if kind is ImageFolder and options.size is None:
        raise UserError(f"{options.source} holds images: say --size PIXELS to resize them to")
    return kind(**given)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _prepare(options: argparse.Namespace) -> None:
    if not is_local(options.dest):
        raise UserError(
            f"{options.dest}: shards are written, and read, on a disk: give a folder, and copy them yourself"
        )
    dest = Path(options.dest).expanduser()
    prepare(_dataset(options), dest)
    written = Shards(str(dest))
    print(f"{dest}: {len(written.train()):,} records to train, {len(written.test()):,} held out")


def _std(options: argparse.Namespace) -> None:
    out = options.spectrum and place(options.spectrum)
    if out and (out.exists() or not out.parent.is_dir()):
        raise UserError(f"--spectrum {out} must be a new file in a folder that exists")
    if out:
        check_writable(out)
    source = _dataset(options).train()
    if out and len(source.shape) != 3:
        raise UserError(f"a spectrum needs images (H, W, C), not records {source.shape}")
    mean, std, rms = moments(source)
    print(f"{len(source):,} records {source.shape}: mean {mean:.5f}, std {std:.5f}, rms {rms:.5f}")
    if out:
        std_by_frequency, rms_by_frequency = spectrum(source)
        content = io.BytesIO()
        np.savez(content, std=std_by_frequency, rms=rms_by_frequency)
        write_whole(out, content.getvalue())
        print(f"{out}: std and rms of each of the {source.shape[0]}×{source.shape[1]} frequencies")


def main() -> None:
    printable()
    parser = argparse.ArgumentParser("python -m gddim.data", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="prepare|std")
    for name, action, text in (
        ("prepare", _prepare, "write SOURCE as shards into the folder DEST; the same command goes on where it stopped"),
        ("std", _std, "print mean, standard deviation and root mean square of SOURCE's training records in [-1, 1]"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.set_defaults(action=action)
        verb.add_argument("source", metavar="SOURCE", help=_SOURCE)
        if name == "prepare":
            verb.add_argument("dest", metavar="DEST", help="folder, new or begun by the same command")
        else:
            verb.add_argument("--spectrum", metavar="FILE", help="also write them by DCT frequency to this .npz file")
        for option, settings in _OPTIONS.items():
            verb.add_argument(_option(option), **settings)
    options = parser.parse_args()
    stopped = "the same command goes on where it stopped" if options.action is _prepare else "nothing is written"
    if status := exit_status(lambda: options.action(options), "images of a smaller --size take less", stopped):
        sys.exit(status)


if __name__ == "__main__":
    main()
