"""Images as files, in a folder or a zip archive: any folder of the user's, and CelebA."""

import contextlib
import functools
import hashlib
import os
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from jaxtyping import Int, UInt8

from gddim.data.decoding import MODES, decoded, is_image, resized, suffixes
from gddim.data.labels import TABLES, image_classes, table_of, with_labels
from gddim.data.sources import ArraySource, Source, data_folder, every_nth
from gddim.errors import UserError, harmless, progress
from gddim.parallel import tell
from gddim.settings import LATER, MAY_CHANGE

_KEEP_DECODED = 2**30  # bytes: smaller sets are decoded once, and a broken image is found before training begins
_CHUNK = 1024
_SHOWN = 3  # names of files passed over
_LISTED = 1000  # damaged images


class _Files:
    """The image files of a folder (with its subfolders, and those that are linked) or zip archive, in the order of their
    names; tells what else is there."""

    def __init__(self, path: Path):
        self.path = path
        self.open: Callable[[str], IO[bytes]]
        self.mark: Callable[[str], Any]  # changes when the file does
        aside: dict[str, list[str]] = defaultdict(list)
        if path.is_dir():
            names = list(_below(path, aside))
            self.open = lambda name: (path / name).open("rb")
            self.mark = lambda name: ((status := os.stat(path / name)).st_size, status.st_mtime_ns)
        elif not path.exists():
            raise UserError(f"{path} does not exist")
        elif zipfile.is_zipfile(path):
            try:
                archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
                raise UserError(f"{path} cannot be read ({error}); it may be damaged") from error
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            self.open = archive.open
            self.mark = lambda name: archive.getinfo(name).CRC
        else:
            damaged = "; it may be damaged" if path.suffix == ".zip" else ""
            raise UserError(f"{path} is neither a folder nor a zip archive of images{damaged}")
        self.names: list[str] = []
        tables = [name for name in names if PurePosixPath(name).name in TABLES]
        for name in sorted({*names} - {*tables}):
            (aside[why] if (why := _no_image(self.open, name)) else self.names).append(name)
        self.table = table_of(self.names, tables)
        aside["table of a part of the images"] += sorted({*tables} - {*TABLES, self.table})
        passed = "; ".join(f"{len(found):,} {why} ({_few(found)})" for why, found in aside.items() if found)
        if not self.names:
            raise UserError(f"{path} holds no images" + (f", but {passed}" if passed else ""))
        if passed:
            tell(f"{path}: {len(self.names):,} images; passed over: {passed}")

    def classes(self) -> dict[str, int]:
        """That of each image, by name. Raises UserError where one has none."""
        content = b""
        if self.table:
            try:
                with self.open(self.table) as file:
                    content = file.read()
            except Exception as error:  # whatever an archive with a password, or a damaged one, raises
                raise UserError(f"{self.path / self.table} cannot be read ({error})") from error
        return image_classes(self.names, self.table, content, self.path)


def _no_image(read: Callable[[str], IO[bytes]], name: str) -> str:
    """Why a file is passed over; nothing for an image."""
    if any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts):
        return "hidden"  # or, in an archive, on a path out of it
    image = PurePosixPath(name).suffix.lower() in suffixes() or is_image(read, name)
    return "" if image else "no image that Pillow reads"


def holds_images(folder: Path) -> bool:
    """Whether a folder, with its subfolders, is one of images."""
    return not all(
        _no_image(lambda name: (folder / name).open("rb"), name) for name in _below(folder, defaultdict(list))
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN)


def _below(root: Path, aside: Mapping[str, list[str]]) -> Iterator[str]:
    """The files below a folder by relative path, each folder read once, those that are linked after the others; of
    those that cannot be read what file systems and desktops leave is passed over, and others raise UserError."""
    folders, seen = deque([root]), set()
    while folders:
        folder = folders.popleft()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            place = os.stat(folder)
        except OSError as error:
            if folder == root or not harmless(folder.name):
                raise UserError(f"{folder} cannot be read ({error.strerror})") from error
            aside["that cannot be read"].append(folder.relative_to(root).as_posix())
            continue
        if (place.st_dev, place.st_ino) in seen:
            aside["linked again"].append(folder.relative_to(root).as_posix())
            continue
        seen.add((place.st_dev, place.st_ino))
        for entry in entries:
            path = folder / entry.name
            name = path.relative_to(root).as_posix()
            with contextlib.suppress(OSError):  # of a link to itself, or to where none may look
                if entry.is_dir():
                    (folders.append if entry.is_symlink() else folders.appendleft)(path)
                    continue
                if entry.is_file():
                    yield name
                    continue
            aside["no file, or a link to none"].append(name)


class ImageFiles:
    """Decoded when asked for, and resized to `shape`: the whole image, or its centre, `crop` pixels or the shorter side
    wide.

    Where one cannot be read all of the folder are tried, and UserError lists those that cannot, with `advice`.
    """

    def __init__(
        self,
        files: _Files,
        names: Sequence[str],
        shape: tuple[int, int, int],
        flip: bool = False,
        crop: int | None = None,
        whole: bool = False,
        advice: str = "",
    ):
        self.shape = shape
        self.dtype = np.dtype(np.uint8)
        self.flip = flip
        self.names = names
        self._files, self._crop, self._whole, self._advice = files, crop, whole, advice
        self._pool = ThreadPoolExecutor(os.cpu_count(), "gddim-decode")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> UInt8[np.ndarray, "b h w c"]:
        out = np.empty((len(indices), *self.shape), np.uint8)
        names = [self.names[int(index)] for index in indices]
        for row, image in enumerate(self._pool.map(self._decode, names)):
            if isinstance(image, str):
                raise UserError(self._refusal(self._damaged(self._files.names) | {names[row]: image}))
            out[row] = image
        return out

    @functools.cached_property
    def stamp(self) -> str:
        """Changes when a file does, or is another."""
        return hashlib.sha256(repr([self.shape, *map(self._files.mark, self.names)]).encode()).hexdigest()[:32]

    def _damaged(self, names: Sequence[str]) -> dict[str, str]:
        """Those of these images that cannot be read, and why."""
        tried = self._pool.map(self._decode, names)
        tried = progress(tried, "looking for damaged images", len(names), unit="img")
        return {name: why for name, why in zip(names, tried, strict=True) if isinstance(why, str)}

    def without_damaged(self) -> "ImageFiles":
        """The others. Raises UserError if there are none."""
        found = self._damaged(self.names)
        which = "\n  ".join([f"{len(found):,} of {len(self):,} images, which cannot be read:", *self._each(found)])
        if len(found) == len(self):
            raise UserError(f"{self._files.path} holds {which}")
        if found:
            tell(f"{self._files.path}: going on without {which}")
        names = [name for name in self.names if name not in found]
        return ImageFiles(self._files, names, self.shape, self.flip, self._crop, self._whole, self._advice)

    def _refusal(self, damaged: Mapping[str, str]) -> str:
        each = self._each(damaged)
        if len(each) == 1:
            return f"{self._files.path}: cannot read {each[0]}: mend or remove it{self._advice}"
        which = f"{len(damaged):,} of {len(self._files.names):,} images"
        return "\n  ".join([f"{self._files.path}: cannot read {which}: mend or remove them{self._advice}:", *each])

    def _each(self, damaged: Mapping[str, str]) -> list[str]:
        listed = [f"{name} ({why})" for name, why in sorted(damaged.items())]
        return [*listed[:_LISTED], *([f"and {len(listed) - _LISTED:,} more"] if len(listed) > _LISTED else [])]

    def _decode(self, name: str) -> UInt8[np.ndarray, "h w c"] | str:
        """The pixels of an image, or why they cannot be had."""
        height, width, channels = self.shape
        try:
            with self._files.open(name) as file:
                image = decoded(file.read(), channels, str(self._files.path))
            small = resized(image, width, height, None if self._whole else self._crop or min(image.size))
            return np.asarray(small).reshape(self.shape)
        except Exception as error:  # decoders of damaged bytes raise nearly anything
            return " ".join(str(error).split()) or type(error).__name__


def _kept_if_small(files: ImageFiles) -> Source:
    """The same records, decoded now and kept in memory if that takes little."""
    if len(files) * int(np.prod(files.shape)) > _KEEP_DECODED:
        return files
    array = np.empty((len(files), *files.shape), np.uint8)
    for begin in progress(range(0, len(files), _CHUNK), "decoding images", unit_scale=_CHUNK, unit="img"):
        rows = np.arange(begin, min(begin + _CHUNK, len(files)))
        array[rows] = files[rows]
    return ArraySource(array, files.flip)


def whole_images(path: Path, size: int | None = None) -> Source:
    """All images of a folder or zip archive in colour, none of them cut: stretched to the height and width of the first,
    or to `size`, as programs that measure FID do."""
    if size is not None and size < 1:
        raise UserError(f"images cannot be stretched to size {size}: it must be positive")
    files = _Files(path)
    height = width = size
    if height is None or width is None:
        with files.open(files.names[0]) as file:
            try:
                width, height = decoded(file.read(), 3, str(path)).size
            except Exception:  # whatever is wrong, it is reported below with the others
                width = height = 1
    return _kept_if_small(ImageFiles(files, files.names, (height, width, 3), whole=True))


@dataclass(frozen=True)
class ImageFolder:
    """All images of a folder (with its subfolders) or zip archive: centre square, resized with antialiasing.

    Their classes are those of its `dataset.json`, as EDM's tools write it, or `labels.csv`, lines `name,class`; without
    either the folders that they are in, numbered in order.

    Read is what Pillow reads with 8 bits a channel, whatever the name; where no alpha is asked for, transparent pixels are
    shown on white. Up to 1 GiB of pixels is decoded at the start and kept; more is decoded as it is read, which
    `python -m gddim.data prepare` does once for all.
    """

    path: str = field(metadata=MAY_CHANGE)
    """Folder or zip archive."""
    size: int
    """Height and width to resize to, in pixels."""
    channels: int = 3
    """1 grey, 2 grey and alpha, 3 red green blue, 4 with alpha."""
    flip: bool = False
    """Whether training may mirror images left to right."""
    test_every: int = 10
    """Of the images in order of name every n-th is held out; 0 holds out none, and tests on all."""
    skip_damaged: bool = field(default=False, metadata=MAY_CHANGE)
    """Go on without the images that cannot be read, which are listed; all are read to find them."""
    labels: bool = field(default=False, metadata=LATER)
    """Whether records have their classes beside them."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, self.channels)

    @functools.cached_property
    def classes(self) -> int:
        return 1 + max(_Files(self.find()).classes().values()) if self.labels else 0

    def find(self) -> Path:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise UserError(f"{path} does not exist")
        return path

    def train(self) -> Source:
        return self._read(0)

    def test(self) -> Source:
        return self._read(1)

    def _read(self, part: int) -> Source:
        if self.size < 1 or self.channels not in MODES:
            raise UserError(f"size must be positive and channels 1 to 4, not {self.size} and {self.channels}")
        files = _Files(self.find())
        classes = files.classes() if self.labels else None
        names = [files.names[row] for row in every_nth(len(files.names), self.test_every)[part]]
        shape, advice = (self.size, self.size, self.channels), ", or go on without by the option skip-damaged"
        images = ImageFiles(files, names, shape, self.flip, advice=advice)
        images = images.without_damaged() if self.skip_damaged else images
        source = _kept_if_small(images)
        if classes is None:
            return source
        return with_labels(source, np.array([classes[name] for name in images.names], np.int32))


@dataclass(frozen=True)
class CelebA:
    """CelebA's aligned faces (Liu et al. 2015): centre 140×140 of the 178×218 pixels, resized to 64×64.

    The official partition: images 1 to 162,770 train, 182,638 to 202,599 test; those between are for validation and
    unused. Google hands out the archive only to a browser, so nothing is downloaded.
    """

    root: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder that holds the images, or `img_align_celeba` or its .zip; by default $GDDIM_DATA, or ~/.cache/gddim."""
    size: int = 64
    """Height and width to resize to, in pixels."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, 3)

    def find(self) -> Path:
        folder = data_folder(self.root)
        if any(folder.glob("[0-9]*.jpg")):
            return folder
        names = ("img_align_celeba", "img_align_celeba.zip")
        for path in (folder / sub / name for sub in (".", "celeba") for name in names):
            if path.exists():
                return path
        page = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
        raise UserError(f"no CelebA in {folder}: put img_align_celeba.zip (aligned and cropped, from {page}) there")

    def train(self) -> Source:
        return self._read(1, 162_770)

    def test(self) -> Source:
        return self._read(182_638, 202_599)

    def _read(self, first: int, last: int) -> Source:
        if self.size < 1:
            raise UserError(f"size must be positive, not {self.size}")
        files = _Files(path := self.find())
        numbers = {name: PurePosixPath(name).stem for name in files.names}
        names = [name for name, stem in numbers.items() if stem.isdecimal() and first <= int(stem) <= last]
        if not names:
            raise UserError(f"{path} holds none of the images {first:06}.jpg to {last:06}.jpg")
        if len(names) < last - first + 1:
            tell(f"{path}: {len(names):,} of the images {first:06}.jpg to {last:06}.jpg are there")
        return _kept_if_small(ImageFiles(files, names, (self.size, self.size, 3), flip=True, crop=140))
