"""Files that a verb leaves in the workdir; each tells inside what it was made from, so that none is lost."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt8

from gddim.errors import UserError
from gddim.evaluation.statistics import write_whole

KEY = "gddim"


def write_png(path: epath.Path, picture: UInt8[np.ndarray, "h w 3"], origin: dict[str, Any]) -> None:
    """A picture; see `make_room` for what happens to one that is there."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text(KEY, json.dumps(origin))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=told)
    make_room(path, origin)
    write_whole(path, buffer.getvalue())


def write_npz(path: epath.Path, samples: Shaped[np.ndarray, "n ..."], origin: dict[str, Any]) -> None:
    """Samples; see `make_room` for what happens to a file that is there."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, samples=samples, gddim=np.array(json.dumps(origin)))
    make_room(path, origin)
    write_whole(path, buffer.getvalue())


def make_room(path: epath.Path, origin: dict[str, Any]) -> None:
    """Let `path` be written: a file of the same origin is replaced, one of another is kept as `NAME-1`, `NAME-2`, ….

    Raises `UserError` for a file that no verb wrote.
    """
    if origin_of(path) in (None, origin):
        return
    others = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, 10**6))
    path.rename(next(other for other in others if not other.exists()))


def origin_of(path: epath.Path) -> dict[str, Any] | None:
    """What a file was made from; None if there is none. Raises `UserError` for a file that no verb wrote."""
    if not path.exists():
        return None
    try:
        if path.suffix == ".png":
            from PIL import Image

            with Image.open(io.BytesIO(path.read_bytes())) as image:
                return json.loads(image.info[KEY])
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return json.loads(str(file[KEY]))
    except Exception as error:  # whatever a reader makes of a file that is not what its name says
        raise UserError(f"{path} was not written by this program and is not overwritten: move it away") from error
