"""The standard deviation of the data as an experiment holds it: a number, or one for every frequency."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from gddim.errors import UserError
from gddim.experiment.options import one_word


@dataclass(frozen=True)
class Spectrum:
    """Root mean square of the data at every frequency `(H, W)` of the orthonormal cosine basis."""

    rms: tuple[tuple[float, ...], ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Spectrum:
        """What `python -m gddim.data std SOURCE --spectrum FILE` wrote. Raises `UserError` for any other file."""
        try:
            with np.load(Path(path).expanduser(), allow_pickle=False) as file:
                rms = np.asarray(file["rms"], np.float64)
        except Exception as error:  # whatever NumPy makes of another file
            raise UserError(f"{path} is no spectrum of python -m gddim.data std --spectrum: {error}") from error
        if rms.ndim != 2 or not np.all((rms > 0) & np.isfinite(rms)):
            raise UserError(f"{path}: a spectrum is (H, W) numbers > 0, here {rms.shape} from {rms.min()} on")
        return cls(tuple(map(tuple, rms.tolist())))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rms), len(self.rms[0])

    def __str__(self) -> str:
        """Its size, overall root mean square and digest: what a run's configuration says of it."""
        values = np.asarray(self.rms)
        digest = hashlib.sha256(values.tobytes()).hexdigest()[:16]
        height, width = self.shape
        return f"spectrum {height}x{width}, rms {np.sqrt(np.mean(values**2)):.4f}, sha256 {digest}"


def parse_std(word: str) -> float | Spectrum:
    """A number, or the spectrum in a file."""
    try:
        return float(word)
    except ValueError:
        return Spectrum.read(word)


DataStd = Annotated[float | Spectrum, one_word("STD|FILE", parse_std, float | Spectrum)]
