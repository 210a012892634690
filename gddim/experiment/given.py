"""Data that a command line gives, in place of noise or of held-out records."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Shaped

from gddim.data import ArrayFile, to_unit
from gddim.data.decoding import decoded, resized
from gddim.errors import UserError, place, require
from gddim.storage import is_local

ARRAYS = (".npy", ".npz")


def given_data(words: Sequence[str], shape: tuple[int, ...]) -> Shaped[np.ndarray, "n ..."]:
    """The images, or the records of arrays, of these files, in their order; images are brought to the size of the data, and
    to [-1, 1] where other files hold floats.

    Raises `UserError` for what cannot be read, and records of another shape.
    """
    parts = [_read(word, place(word), shape) for word in words]
    if len({part.dtype for part in parts}) > 1:
        parts = [np.asarray(to_unit(jnp.asarray(part))) for part in parts]
    return np.concatenate(parts)


def _read(word: str, path: epath.Path, shape: tuple[int, ...]) -> np.ndarray:
    if path.suffix in ARRAYS:
        require(is_local(path), f"--from {word}: arrays are read from the disk: copy it here first")
        source = ArrayFile(word, test_every=0).train()
        if source.shape != shape:
            raise UserError(f"--from {word} holds records {source.shape}, the run's are {shape}")
        if not len(source):
            raise UserError(f"--from {word} holds no records")
        return np.asarray(source[np.arange(len(source))])
    if len(shape) != 3:
        raise UserError(f"--from {word}: of records {shape} give arrays, as .npy or .npz")
    if path.is_dir():
        raise UserError(f"--from {word} is a folder: give files, as {word}/*.png")
    height, width, channels = shape
    try:
        image = decoded(path.read_bytes(), channels, word)
        if image.size != (width, height):
            image = resized(image, width, height, min(image.size) if height == width else None)
        return np.asarray(image, np.uint8).reshape(1, *shape)
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise UserError(f"--from {word} cannot be read: {str(error).splitlines()[0]}") from error
