"""The bytes of an image file to a picture of 8 bits a channel, upright, on white."""

import functools
import io
import re
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gddim.errors import from_extra
from gddim.parallel import tell

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_DOCUMENTS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MCIDAS", "MPEG", "WMF"}  # Pillow opens them, and decodes none
_DEEP = re.compile(r";16[BLN]|SGI16|BC6H")  # what tiles of more than 8 bits a channel name, of which Pillow keeps 8
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, {1, 4}  # tags of a TIFF; 4 is "undefined", read as unsigned
_SIZ = b"\xff\x4f\xff\x51"  # how a JPEG 2000 codestream begins


@functools.cache
def _formats() -> frozenset[str]:
    with from_extra("train"):
        from PIL import Image

    Image.init()
    return frozenset(Image.OPEN) - _DOCUMENTS


@functools.cache
def suffixes() -> frozenset[str]:
    """Those of the formats that Pillow decodes, in lower case and with their dots."""
    with from_extra("train"):
        from PIL import Image

    known = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


@functools.cache
def _signed() -> tuple[str, ...]:
    """The formats that are known by their first bytes; the others take nearly any file for an image."""
    with from_extra("train"):
        from PIL import Image

    return tuple(name for name in _formats() if Image.OPEN[name][1])


def is_image(read: Callable[[str], IO[bytes]], name: str) -> bool:
    """Whether a file begins as an image does, whatever it is called."""
    with from_extra("train"):
        from PIL import Image

    try:
        with read(name) as file, Image.open(file, formats=_signed()):
            return True
    except Exception:  # decoders of other files raise nearly anything
        return False


def _lost(image: "Image.Image", content: bytes) -> str | None:
    """What of its samples 8 bits cannot hold, as the file tells it; the mode tells only what Pillow makes of them."""
    bits, signed = 8, False
    if image.mode.startswith(("I", "F")):
        bits = 16
    for codec, _, _, args in getattr(image, "tile", ()):
        if _DEEP.search(f"{codec} {args}"):
            bits = 16
        elif codec.startswith("ppm") and isinstance(args, tuple):  # raw mode and greatest value
            bits = args[1].bit_length()
        elif codec == "dds_rgb":  # bits of a pixel, and those of each channel
            bits = max(mask.bit_count() for mask in args[1])
    if image.format == "TIFF":
        tags: Any = image
        bits = max(bits, *tags.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
        signed = not _UNSIGNED.issuperset(tags.tag_v2.get(_SAMPLE_FORMAT, (1,)))
    elif image.format == "JPEG2000":
        samples = content[content.index(_SIZ) + 40 :]  # the length of the segment, …, their count, and 3 bytes for each
        kinds = samples[2 : 2 + 3 * int.from_bytes(samples[:2]) : 3]
        bits, signed = max(kind % 128 + 1 for kind in kinds), max(kinds) >= 128
    elif image.format == "AVIF" and content[content.index(b"av1C") + 6] & 0x40:  # its high_bitdepth
        bits = 10
    if bits > 8:
        return "it has more than 8 bits a channel: scale it to 8"
    return "its samples are signed: scale them to 0 … 255" if signed else None


def _frames(image: "Image.Image") -> int:
    """How many there are, of a file whose later ones are damaged at least two; the image is of no more use."""
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # Pillow goes through all of them, and each format fails in another way
        return 2


def decoded(content: bytes, channels: int, where: str) -> "Image.Image":
    """An image as its camera held it, in 1 to 4 channels; without alpha, what is transparent is shown on white, which is
    said once of each place.

    Raises ValueError for more than 8 bits a channel, which nobody can scale without knowing how many of them are used,
    and for signed samples; and whatever Pillow raises for damaged bytes.
    """
    with from_extra("train"):
        from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("no image that Pillow knows") from None
    with opened:
        if lost := _lost(opened, content):
            raise ValueError(lost)
        image = ImageOps.exif_transpose(opened)
        if opened.format != "MPO" and _frames(opened) > 1:  # of that the second is another view
            tell(f"{where}: of images of several frames the first is taken")
        if channels in (1, 3) and image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                tell(f"{where}: transparent pixels are shown on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(MODES[channels])


def resized(image: "Image.Image", width: int, height: int, crop: int | None) -> "Image.Image":
    """The centre of an image, `crop` pixels wide and high, or all of it, brought to another size with antialiasing."""
    from PIL import Image

    if crop:
        if crop > min(image.size):
            raise ValueError(f"it is {image.width}×{image.height}, smaller than {crop}×{crop}")
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))  # the filter sees the crop alone
    return image.resize((width, height), Image.Resampling.BILINEAR)
