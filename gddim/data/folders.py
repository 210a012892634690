"""Images as files, in a folder or a zip archive: any folder of the user's, and CelebA."""

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from gddim.data.sources import ArraySource, Source, data_folder, every_nth
from gddim.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_KEEP_DECODED = 2**30  # bytes: smaller sets are decoded once, and a broken image is found before training begins
_CHUNK = 1024


class _Files:
    """The image files of a folder (with its subfolders) or zip archive, in the order of their names."""

    def __init__(self, path: Path):
        self.path = path
        self.read: Callable[[str], bytes]
        if path.is_dir():
            names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            self.read = lambda name: (path / name).read_bytes()
        elif zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            names = (info.filename for info in archive.infolist() if not info.is_dir())
            self.read = archive.read
        elif not path.exists():
            raise UserError(f"{path} does not exist")
        else:
            damaged = "; it may be damaged" if path.suffix == ".zip" else ""
            raise UserError(f"{path} is neither a folder nor a zip archive of images{damaged}")
        self.names = sorted(name for name in names if _is_image(PurePosixPath(name)))
        if not self.names:
            raise UserError(f"{path} holds no images ({', '.join(_SUFFIXES)})")


def _is_image(name: PurePosixPath) -> bool:
    """Whether a name is that of an image, not hidden and not (in an archive) a path out of it."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
    return name.suffix.lower() in _SUFFIXES and not hidden


class ImageFiles:
    """Decoded when asked for: the centre, `crop` pixels or the shorter side wide, resized to `size`."""

    def __init__(
        self, files: _Files, names: Sequence[str], size: int, channels: int, flip: bool, crop: int | None = None
    ):
        self.shape = (size, size, channels)
        self.dtype = np.dtype(np.uint8)
        self.flip = flip
        self._files, self._names, self._crop = files, names, crop
        self._pool = ThreadPoolExecutor(os.cpu_count(), "gddim-decode")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> UInt8[np.ndarray, "b h w c"]:
        out = np.empty((len(indices), *self.shape), np.uint8)
        for row, image in enumerate(self._pool.map(self._decode, indices.tolist())):
            out[row] = image
        return out

    def _decode(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        from PIL import Image, ImageOps, UnidentifiedImageError

        name = self._names[index]
        size, _, channels = self.shape
        try:
            with Image.open(io.BytesIO(self._files.read(name))) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise ValueError(f"its mode is {opened.mode}, but only 8 bits a channel are read")
                image = ImageOps.exif_transpose(opened).convert(_MODES[channels])
            side = self._crop or min(image.size)
            if side > min(image.size):
                raise ValueError(f"it is {image.width}×{image.height}, smaller than {side}×{side}")
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            small = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)  # the filter sees the crop alone
        except Exception as error:  # decoders of damaged bytes raise nearly anything
            reason = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"{self._files.path}: cannot read {name} ({reason}): mend or remove it") from error
        return np.asarray(small).reshape(self.shape)


def _kept_if_small(files: ImageFiles) -> Source:
    """The same records, decoded now and kept in memory if that takes little."""
    if len(files) * int(np.prod(files.shape)) > _KEEP_DECODED:
        return files
    array = np.empty((len(files), *files.shape), np.uint8)
    for begin in tqdm(range(0, len(files), _CHUNK), "decoding images", unit_scale=_CHUNK, unit="img", disable=None):
        rows = np.arange(begin, min(begin + _CHUNK, len(files)))
        array[rows] = files[rows]
    return ArraySource(array, files.flip)


@dataclass(frozen=True)
class ImageFolder:
    """All images of a folder (with its subfolders) or zip archive: centre square, resized with antialiasing.

    Up to 1 GiB of pixels is decoded at the start and kept; more is decoded as it is read, which `python -m gddim.data
    prepare` does once for all.
    """

    path: str
    """Folder or zip archive."""
    size: int
    """Height and width to resize to, in pixels."""
    channels: int = 3
    """1 grey, 2 grey and alpha, 3 red green blue, 4 with alpha."""
    flip: bool = False
    """Whether training may mirror images left to right."""
    test_every: int = 10
    """Of the images in order of name every n-th is held out; 0 holds out none, and tests on all."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, self.channels)

    def train(self) -> Source:
        return self._read(0)

    def test(self) -> Source:
        return self._read(1)

    def _read(self, part: int) -> Source:
        if self.size < 1 or self.channels not in _MODES:
            raise UserError(f"size must be positive and channels 1 to 4, not {self.size} and {self.channels}")
        files = _Files(Path(self.path).expanduser())
        names = [files.names[row] for row in every_nth(len(files.names), self.test_every)[part]]
        return _kept_if_small(ImageFiles(files, names, self.size, self.channels, self.flip))


@dataclass(frozen=True)
class CelebA:
    """CelebA's aligned faces (Liu et al. 2015): centre 140×140 of the 178×218 pixels, resized to 64×64.

    The official partition: images 1 to 162,770 train, 182,638 to 202,599 test; those between are for validation and
    unused. Google hands out the archive only to a browser, so nothing is downloaded.
    """

    root: str | None = None
    """Folder that holds the images, or `img_align_celeba` or its .zip; by default $GDDIM_DATA, or ~/.cache/gddim."""
    size: int = 64
    """Height and width to resize to, in pixels."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, 3)

    def train(self) -> Source:
        return self._read(1, 162_770)

    def test(self) -> Source:
        return self._read(182_638, 202_599)

    def _read(self, first: int, last: int) -> Source:
        folder = data_folder(self.root)
        names = ("img_align_celeba", "img_align_celeba.zip")
        places = [folder / sub / name for sub in (".", "celeba") for name in names]
        if any(folder.glob("[0-9]*.jpg")):
            places = [folder]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            page = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
            raise UserError(f"no CelebA in {folder}: put img_align_celeba.zip (aligned and cropped, from {page}) there")
        files = _Files(path)
        numbers = {name: PurePosixPath(name).stem for name in files.names}
        names = [name for name, stem in numbers.items() if stem.isdecimal() and first <= int(stem) <= last]
        if not names:
            raise UserError(f"{path} holds none of the images {first:06}.jpg to {last:06}.jpg")
        return _kept_if_small(ImageFiles(files, names, self.size, 3, flip=True, crop=140))
