"""Time grids: `steps + 1` decreasing float64 times from t_max to t_min."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gddim.sde.base import AbstractLinearSDE, positions
from gddim.sde.host import on_host
from gddim.sde.linalg import inverse

Number = Any  # a Python, NumPy or JAX scalar
DATA_STD, SIZE = 0.5, 64  # a scale of data, and of how many numbers they are


def data_scale(shape: tuple[int, ...]) -> float:
    """The unit of noise levels for data of a shape, in [-1, 1]: `0.5 √(n/64)` for n numbers, at least 0.5; to two decimals.

    Images vary along a few directions, however many pixels they have: their standard deviation along these, and with it the
    noise that hides them, grows with √n. It is the `data_std` of `band_grid`, `tuned_grid` and `GDDIM` for them.

    Measured with the exact denoiser of 2,000 images of CIFAR-10 as they are, made smaller and larger: at 5 calls through VP
    the median error of `gddim:3:data:free@tuned` is least at 0.5, 0.75, 1, 2 and 6 for images 8×8×1, 8×8×3, 16×16×3, 32×32×3
    and 64×64×3, the root mean square at 0.75, 1, 3, 8 and 12; this is 0.5, 0.87, 1.73, 3.46 and 6.93. See
    experiments/results/solvers.md.

    >>> data_scale((2,)), data_scale((8, 8, 1)), data_scale((32, 32, 3))
    (0.5, 0.5, 3.46)
    """
    return round(DATA_STD * max(1.0, (math.prod(shape) / SIZE) ** 0.5), 2)


def scaled(it: Any, shape: tuple[int, ...]) -> Any:
    """A sampler or grid with the `data_scale` of a shape as its `data_std`, unless it was told one; 0.5 is left untold."""
    scale = data_scale(shape)
    return it if it.data_std is not None or scale == DATA_STD else dataclasses.replace(it, data_std=scale)


def power_grid(t_max: Number, t_min: Number, steps: Number, power: Number = 2.0) -> np.ndarray:
    """Times uniform in `t^{1/power}` from `t_max` down to `t_min`. Returns `(steps + 1,)`. gDDIM, appendix C.

    `t_max`: where sampling starts, the horizon of a process.
    `t_min`: where it ends, small; 0 for samplers that make no call there.
    `steps`: how many.
    `power`: 1 is uniform in t, more has more of the small times.

    Raises `ValueError` unless `0 ≤ t_min < t_max`, `steps ≥ 1` and `power > 0`.

    >>> power_grid(1.0, 0.0, steps=4)
    array([1.    , 0.5625, 0.25  , 0.0625, 0.    ])
    """
    t_max, t_min, steps = _range(t_max, t_min, steps)
    if not power > 0:
        raise ValueError(f"power={power} must be > 0")
    power = float(power)
    grid = np.linspace(t_max ** (1 / power), t_min ** (1 / power), steps + 1) ** power
    grid[0], grid[-1] = t_max, t_min
    return grid


def uniform_grid(t_max: Number, t_min: Number, steps: Number) -> np.ndarray:
    """Times uniform in t: the `power_grid` of power 1, whose arguments these are. Returns `(steps + 1,)`."""
    return power_grid(t_max, t_min, steps, power=1.0)


def two_phase_grid(
    t_max: Number, t_min: Number, steps: Number, share: Number = 0.5, fraction: Number = 0.5, power: Number = 2.0
) -> np.ndarray:
    """A share of the steps uniform from `t_max` to `fraction · t_max`, the rest a power grid down to `t_min`.

    `t_max`, `t_min`, `steps`, `power`: as in `power_grid`.
    `share`: of the steps, those of the first phase.
    `fraction`: of `t_max`, where the first phase ends.

    Returns `(steps + 1,)`. Raises `ValueError` unless share and fraction lie in (0, 1), `fraction · t_max > t_min`, and
    both phases have a step.
    """
    t_max, t_min, steps = _range(t_max, t_min, steps)
    share, fraction = float(share), float(fraction)
    if not 0 < share < 1 or not 0 < fraction < 1:
        raise ValueError(f"share={share} and fraction={fraction} must lie in (0, 1)")
    middle, first = fraction * t_max, round(share * steps)
    if not middle > t_min:
        raise ValueError(f"fraction={fraction} of t_max={t_max} must lie above t_min={t_min}")
    if not 0 < first < steps:
        raise ValueError(f"share={share} of steps={steps} leaves a phase without steps")
    return np.concatenate([uniform_grid(t_max, middle, first)[:-1], power_grid(middle, t_min, steps - first, power)])


def log_snr_grid(sde: AbstractLinearSDE, t_max: Number, t_min: Number, steps: Number) -> np.ndarray:
    """Times uniform in the log signal-to-noise ratio `log ψᵀΣ_t⁻¹ψ = −2 log r`, see `noise_level`. Returns `(steps + 1,)`.

    `sde`: the process; `t_max`, `t_min`, `steps`: as in `power_grid`.

    For k = 1 this is the usual `log α_t/σ_t²`; for CLD it is the precision that the whole state gives of the data. Raises
    `ValueError` for a process with one ratio per frequency, and for `t_min = 0` where the ratio is infinite.
    """
    if positions(sde):
        raise ValueError(f"{type(sde).__name__} has a signal-to-noise ratio per frequency; use power_grid")
    return _uniform_in(np.log, sde, t_max, t_min, steps)


def karras_grid(sde: AbstractLinearSDE, t_max: Number, t_min: Number, steps: Number, rho: Number = 7.0) -> np.ndarray:
    """Times uniform in `r^{1/rho}`, see `noise_level`: those of EDM (Karras et al. 2022, Eq. 5). Returns `(steps + 1,)`.

    `sde`: the process; `t_max`, `t_min`, `steps`: as in `power_grid`; `rho`: > 0, more has more of the small times.

    Raises `ValueError` outside the ranges, and where r is infinite at `t_max`.
    """
    if not rho > 0:
        raise ValueError(f"rho={rho} must be > 0")
    return _uniform_in(lambda r: r ** (1 / float(rho)), sde, t_max, t_min, steps)


def band_grid(
    sde: AbstractLinearSDE, t_max: Number, t_min: Number, steps: Number, data_std: Number = DATA_STD,
    lo: Number | None = None, hi: Number | None = None, rms: Number | None = None,
) -> np.ndarray:  # fmt: skip
    """Times uniform in `log((r + lo s)/(r + hi s))`, r the `noise_level`: log-SNR confined to the scales that data have.

    Above `hi` standard deviations of the data the noise hides everything, below `lo` nothing; steps there are spent in
    vain, and this grid makes few.

    `sde`: the process; `t_max`, `t_min`, `steps`: as in `power_grid`.
    `data_std`: s, the scale of the data: for images, `data_scale` of their shape.
    `lo`, `hi`: the band, in units of `data_std`; without them that of `band_of`.
    `rms`: of data whose scale is larger, as images, whose details do not grow with their size: the unit of `lo` up to 4 steps
    of one field and beyond 10 steps, where `lo` is not told; s without it.

    Returns `(steps + 1,)`. Raises `ValueError` unless `0 < lo < hi` and `0 < rms ≤ data_std`, all finite.

    >>> times = band_grid(gddim.CLD(), 1.0, 1e-3, steps=4)
    >>> bool(np.all(np.diff(times) < 0)), times.shape
    (True, (5,))
    """
    if rms is not None and not 0 < rms <= data_std < np.inf:
        raise ValueError(f"data_std={data_std}, rms={rms}: needs 0 < rms ≤ data_std, finite")
    own = band_of(sde, steps, 1.0 if rms is None else float(rms / data_std))
    clock = Band.of(data_std, own[0] if lo is None else lo, own[1] if hi is None else hi)
    return _uniform_in(clock, sde, t_max, t_min, steps)


def band_of(sde: AbstractLinearSDE, steps: Number, rms: float = 1.0) -> tuple[float, float]:
    """The band that was best by measurement, for so many steps of `gddim:3:data:free`: few leave the extremes out.

    In units of the scale of the data, and `rms` is their root mean square in these, it is 0.4 rms to 6 up to 4 steps, 0.06 to 6
    up to 10, and 0.06 rms to 6 beyond; for several fields 0.4 to 3 up to 4, 0.3 to 4 up to 6 and 0.15 to 3 up to 10.
    """
    if sde.k == 1 or steps > 10:
        return (0.4 * rms if steps <= 4 else 0.06 if steps <= 10 else 0.06 * rms), 6.0
    if steps <= 4:
        return 0.4, 3.0
    return (0.3, 4.0) if steps <= 6 else (0.15, 3.0)


BAND = 0.06, 6.0  # in units of the scale of the data
LEARNED: dict[tuple[bool, int], tuple[float, ...]] = {
    (False, 5): (0.1876, 0.3800, 0.5870, 0.7713),
    (False, 6): (0.1654, 0.3051, 0.4927, 0.6888, 0.8455),
    (False, 8): (0.1375, 0.2582, 0.3891, 0.5411, 0.6586, 0.8298, 0.9009),
    (False, 10): (0.0951, 0.2028, 0.2888, 0.3897, 0.4947, 0.6061, 0.7073, 0.8621, 0.9168),
    (True, 6): (0.1493, 0.2822, 0.4149, 0.5583, 0.7341),
    (True, 8): (0.1328, 0.2421, 0.3475, 0.4706, 0.5934, 0.7714, 0.8488),
    (True, 10): (0.1157, 0.2132, 0.3072, 0.4030, 0.4994, 0.6157, 0.7024, 0.8410, 0.9082),
} | dict.fromkeys(
    [(False, 15), (True, 15)],
    (0.0796, 0.1562, 0.2267, 0.2706, 0.3334, 0.3751, 0.4424, 0.5021, 0.5768, 0.6617, 0.7462, 0.8235, 0.9248, 0.9581),
)  # fmt: skip
"""By whether there are several fields, and steps: the shares of the way in Φ at which the inner times of `tuned_grid` lie.

Found by Adam as in `experiments.solvers.tune`, on 30 to 80 mixtures, those of one field through VP and others through CLD; at
first the scale of `arctan(r / 2.5 s)` was free with them. Those of 5 steps are a quarter of the way back to the band of 0.3 to
6; of several fields those of 6 two thirds to that of 0.3 to 4, those of 8 a fifth, those of 10 half to that of 0.06 to 6: what
was learned has smaller median errors still, but larger root mean squares and Fréchet distances of the digits, and at 10 of
CIFAR-10."""


def tuned_grid(
    sde: AbstractLinearSDE, t_max: Number, t_min: Number, steps: Number, data_std: Number = DATA_STD,
    rms: Number | None = None,
) -> np.ndarray:  # fmt: skip
    """Times of 5 to 10 or 15 steps as they were learned by gradients through `gddim:3:data:free` on Gaussian mixtures, those of
    5 for one field alone, those of 7 and 9 between their neighbours'. Others are those of `band_grid`.

    Learned ones lie at shares of the way from `t_max` to `t_min` in `log((r + 0.06 s)/(r + 6 s))`, r the `noise_level`.

    `sde`: the process; `t_max`, `t_min`, `steps`: as in `power_grid`; `data_std`: s, and `rms`, as in `band_grid`.

    Returns `(steps + 1,)`. Raises `ValueError` like `band_grid` where it is that.

    >>> times = tuned_grid(gddim.VP(), 1.0, 1e-3, steps=8)
    >>> bool(np.all(np.diff(times) < 0)), times.shape
    (True, (9,))
    """
    t_max, t_min, steps = _range(t_max, t_min, steps)
    learned = {n: [0.0, *shares, 1.0] for (several, n), shares in LEARNED.items() if several == (sde.k > 1)}
    near = [steps] if steps in learned else [steps - 1, steps + 1]
    if any(n not in learned for n in near):
        return band_grid(sde, t_max, t_min, steps, data_std, rms=rms)
    part = np.linspace(0, 1, steps + 1)
    shares = np.mean([np.interp(part, np.linspace(0, 1, n + 1), learned[n]) for n in near], axis=0)
    return spaced(Band.of(data_std, *BAND), sde, t_max, t_min, shares)


class Band(NamedTuple):
    """`Φ(r) = log((r + lo)/(r + hi))`, rising in r; 0 at r = ∞."""

    lo: float
    hi: float

    @staticmethod
    def of(data_std: Number, lo: Number, hi: Number) -> Band:
        """Of a band in units of `data_std`. Raises `ValueError` for what is none."""
        if not (0 < lo < hi < np.inf and 0 < data_std < np.inf):
            raise ValueError(
                f"lo={lo}, hi={hi}, data_std={data_std}: a band needs 0 < lo < hi and data_std > 0, finite"
            )
        return Band(float(lo * data_std), float(hi * data_std))

    def __call__(self, r: np.ndarray) -> np.ndarray:
        return -np.log1p((self.hi - self.lo) / (r + self.lo))


def noise_level(sde: AbstractLinearSDE, t: np.ndarray) -> np.ndarray:
    """`r_t = (ψᵀΣ_t⁻¹ψ)^{-1/2}`, `ψ = Ψ(t, 0) e_0`: the noise on the data that the state is equivalent to. Shape of t.

    For k = 1 it is σ/α. Where it differs by position, that of the first: in a cosine basis, of the lowest frequency.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        R_inv, psi = inverse(on_host(sde.noise_factor, t)), on_host(sde.transition, t, np.zeros_like(t))
        first = [v.reshape(*t.shape, -1, sde.k, sde.k)[..., 0, :, :] for v in (R_inv, psi)]
        return ((first[0] @ first[1][..., :, :1]) ** 2).sum((-1, -2)) ** -0.5


def time_at(sde: AbstractLinearSDE, sigma: Number) -> float:
    """The time at which the `noise_level` is `sigma`, by bisection; 0 or the horizon where it is never as low or high."""
    low, high = 0.0, float(sde.horizon)
    for _ in range(80):  # r rises with t
        middle = (low + high) / 2
        below = noise_level(sde, np.array([middle]))[0] < sigma
        low, high = (middle, high) if below else (low, middle)
    return high


def _uniform_in(
    clock: Callable[[np.ndarray], np.ndarray], sde: AbstractLinearSDE, t_max: Number, t_min: Number, steps: Number
) -> np.ndarray:
    """Times uniform in a rising function of r, `(steps + 1,)`. Raises `ValueError` where it is not finite at an end."""
    t_max, t_min, steps = _range(t_max, t_min, steps)
    return spaced(clock, sde, t_max, t_min, np.linspace(0, 1, steps + 1))


def spaced(
    clock: Callable[[np.ndarray], np.ndarray], sde: AbstractLinearSDE, t_max: float, t_min: float, shares: np.ndarray
) -> np.ndarray:
    """The times at these shares, rising from 0 to 1, of the way from `t_max` to `t_min` as a rising function of r has it."""

    def level(t: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return clock(noise_level(sde, t))

    ends = level(np.array([t_max, t_min]))
    if not np.all(np.isfinite(ends)):
        which = "lower t_max" if np.isfinite(ends[1]) else "raise t_min"
        raise ValueError(f"the log signal-to-noise ratio is not finite on [{t_min}, {t_max}]; {which}")
    target = ends[0] + shares * (ends[1] - ends[0])
    low, high = np.full(len(shares), t_min), np.full(len(shares), t_max)
    for _ in range(80):  # bisection: r rises with t
        middle = (low + high) / 2
        below = level(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    grid = (low + high) / 2
    grid[0], grid[-1] = t_max, t_min
    return grid


def check_grid(sde: AbstractLinearSDE, ts: Any, data: bool = False) -> np.ndarray:
    """`ts` as float64 NumPy. Raises `ValueError` unless it is a strictly decreasing list of ≥ 2 times in [0, horizon], and
    something is left of the data at the first (unless the sampler takes what a model foresees of the `data`).
    """
    try:
        grid = np.asarray(ts, np.float64)
    except (TypeError, ValueError) as error:
        given = "traced ones" if isinstance(error, jax.errors.JAXTypeError) else repr(ts)
        message = f"ts must be a list of concrete numbers (coefficients are computed on the host), given {given}"
        raise ValueError(message) from error
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(f"ts has shape {grid.shape}; a grid is a list of at least two times")
    if not np.all(np.diff(grid) < 0):
        raise ValueError(f"ts must decrease strictly, given {np.array2string(grid, threshold=8)}")
    if grid[-1] < 0 or grid[0] > sde.horizon * (1 + 1e-6):
        raise ValueError(f"ts spans [{grid[-1]}, {grid[0]}]; this process is defined on [0, {sde.horizon}]")
    grid = np.minimum(grid, sde.horizon)
    if not (data or np.all(np.isfinite(on_host(sde.transition, grid[1:2], grid[:1])))):
        raise ValueError(
            f"nothing is left of the data at ts[0]={grid[0]}, where this {type(sde).__name__} can be started by "
            'interpolate="data" or "residual" alone, with a model that has .denoise(u, t): gddim.through(sde, denoise) or a '
            "gddim.Denoiser; start the grid below"
        )
    return grid


def check_end(sde: AbstractLinearSDE, ts: np.ndarray) -> np.ndarray:
    """The grid, for a sampler that calls ε at its end. Raises `ValueError` where R is singular there."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if ts[-1] == 0 and not np.all(np.isfinite(inverse(on_host(sde.noise_factor, ts[-1:])))):
            raise ValueError("this sampler calls ε at ts[-1]=0, where R is singular; end the grid at a t_min > 0")
    return ts


def _range(t_max: Any, t_min: Any, steps: Any) -> tuple[float, float, int]:
    """The range and the number of steps, scalars of any library, as Python's."""
    if not 0 <= t_min < t_max:
        raise ValueError(f"t_min={t_min}, t_max={t_max}: a grid needs 0 ≤ t_min < t_max")
    count = np.asarray(steps)
    if count.ndim or count.dtype.kind not in "iuf" or not 1 <= count == np.floor(count) < np.inf:
        raise ValueError(f"steps={steps!r} must be a positive integer")
    return float(t_max), float(t_min), int(count)
