"""What the Denoiser has to know about the data: its standard deviation, overall or by frequency."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gddim.data.sources import Source, x0_and_cond
from gddim.errors import UserError, progress

_CHUNK = 1024


class Moments(NamedTuple):
    """Mean, standard deviation about it and root mean square, over all records, positions and channels."""

    mean: float
    std: float
    rms: float


def moments(source: Source) -> Moments:
    """Of the data as a model sees them, uint8 scaled to [-1, 1]. Raises `UserError` for none."""
    if not len(source):
        raise UserError("the data set is empty")
    total = square = count = 0.0
    for x in _scaled(source):
        total, square, count = total + x.sum(), square + (x * x).sum(), count + x.size
    mean, mean_square = total / count, square / count
    return Moments(float(mean), float(np.sqrt(max(0.0, mean_square - mean**2))), float(np.sqrt(mean_square)))


def spectrum(source: Source) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """Standard deviation and root mean square of every orthonormal DCT-II coefficient, over records and channels.

    The deviation of a coefficient is that from its mean in its channel. Images only.
    """
    from scipy.fft import dctn

    total, square = np.zeros(source.shape), np.zeros(source.shape)
    for x in _scaled(source):
        y = np.asarray(dctn(x, axes=(1, 2), norm="ortho"))
        total, square = total + y.sum(0), square + (y * y).sum(0)
    mean, mean_square = total / len(source), square / len(source)
    variance = np.maximum(mean_square - mean**2, 0)
    return np.sqrt(variance.mean(-1)), np.sqrt(mean_square.mean(-1))


def _scaled(source: Source):
    for begin in progress(range(0, len(source), _CHUNK), "reading", unit_scale=_CHUNK, unit=" records"):
        x, _ = x0_and_cond(source[np.arange(begin, min(begin + _CHUNK, len(source)))])
        yield x / 127.5 - 1 if x.dtype == np.uint8 else x.astype(np.float64)
