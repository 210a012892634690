"""Ψ, R, F and GGᵀ of a linear SDE as polynomials, from its coefficients: panels are halved until all are resolved."""

import warnings
from typing import NamedTuple

import numpy as np

from gddim.sde.coefficients import Coefficients, ToldApart
from gddim.sde.collocation import NODES, TO_LEGENDRE, TOLERANCE, at_points, tail
from gddim.sde.panels import Panels, measure, propagate

NEGLIGIBLE = 1e-14  # errors of F or GGᵀ that change Ψ or Σ by less, relative to them, are none: so a jump's panels end
NOISE = 1e-6  # an error below it that three halvings shrink nowhere is rounding in the coefficients
TOLD = 1e-10  # from here on a warning says how large that is
STEEP = 1e-5  # a coefficient whose error on a panel of no width changes Ψ or Σ by more has no limit there
SEEN = 1e-8  # what the scan sees, relative to the coefficients of the panel
CAUSES = ("drift", "diffusion_squared", "the transition matrix", "the noise factor")


class Polynomials(NamedTuple):
    """Legendre coefficients `(panels, nodes, kinds, k, k)` in y = √t between the `edges` `(panels+1,)`.

    `psi` is `Ψ(τ, lower edge)`, for k = 1 its logarithm. `ahead` is, for k = 1, the logarithm of `Ψ(lower edge, 0)`,
    `(panels, kinds, 1, 1)`; for k > 1, `ahead[j]` is Ψ from the lower edge over 2^j panels and `back[j]` its inverse.
    """

    edges: np.ndarray
    psi: np.ndarray
    R: np.ndarray
    F: np.ndarray
    GG: np.ndarray
    ahead: np.ndarray
    back: np.ndarray


def solve(coefficients: Coefficients, breakpoints: np.ndarray) -> Polynomials:
    """Solve the process on panels that end at the breakpoints, refined where F, GGᵀ, Ψ or R are not resolved.

    Raises `ValueError`, naming argument and time, where no number of panels that fits resolves them.
    """
    with np.errstate(all="ignore"):  # what is not resolved yet may overflow; what is kept is looked at
        while True:
            try:
                return _solve(coefficients, breakpoints)
            except ToldApart:
                continue


def _solve(coefficients: Coefficients, breakpoints: np.ndarray) -> Polynomials:
    first, _ = coefficients.kinds
    k = coefficients.shape[-1]
    covariance = coefficients.covariance.reshape(-1, k, k)[first]
    most = int(np.clip(2**20 // (len(first) * k * k), 2**9, 2**14))
    edges = _first_edges(coefficients.horizon, breakpoints)
    if len(edges) > most:
        raise ValueError(f"breakpoints has {len(breakpoints)} times; {most - 12} fit for these coefficients")
    panels, scan = measure(coefficients, edges[:-1], edges[1:]), None
    fresh = np.zeros(len(panels.lower), bool)
    before, stale = np.full(len(fresh), np.inf), np.zeros(len(fresh), int)
    while True:
        fast = panels.rate > 1
        if fast.any():
            _refuse_rates(panels, most)
            cause, error, effect = np.zeros(len(fast), int), np.where(fast, np.inf, 0), np.where(fast, panels.rate, 0)
        else:
            _refuse_values(panels)
            L, R = propagate(panels, covariance)
            _refuse_range(panels, L)
            cause, error, effect = _judge(panels, L, R)
        pairs = np.flatnonzero(fresh).reshape(-1, 2)  # the two halves of what was halved last
        stuck = ((error[pairs] > TOLERANCE) & (error[pairs] > before[pairs] / 2)).all(1)
        stale[pairs] = np.where(stuck, stale[pairs[:, 0]] + 1, 0)[:, None]
        noisy = (stale > 2) & (error < NOISE)
        width = panels.upper - panels.lower
        finest = width <= np.maximum(8 * np.finfo(float).eps * panels.upper, 2.0**-60 * edges[-1])
        rough = ~(error <= TOLERANCE) & ~noisy
        _refuse_singular(panels, cause, effect, rough, finest)
        left = np.where(noisy, error, np.where(rough & finest & (panels.lower > 0), np.minimum(error, effect), 0))
        rough &= ~finest
        if not rough.any():
            scan, told = scan or _Scan(coefficients, panels), (cause, left)
            cause, missed = scan.missed(panels, left.max())
            rough = (missed > 0) & (panels.duration > 1e-8 * coefficients.horizon)
            error = np.where(rough, missed, error)
            if not rough.any():
                _tell(panels, *told)
                return _polynomials(panels, R)
        if len(rough) + rough.sum() > most:
            _refuse_roughness(panels, cause, error, rough)
        middle = (panels.lower + panels.upper)[rough] / 2
        halves = measure(coefficients, np.append(panels.lower[rough], middle), np.append(middle, panels.upper[rough]))
        whole = Panels(*(np.concatenate([old[~rough], new]) for old, new in zip(panels, halves, strict=True)))
        order = np.argsort(whole.lower)
        panels = Panels(*(values[order] for values in whole))
        fresh = np.append(np.zeros((~rough).sum(), bool), np.ones(len(halves.lower), bool))[order]
        before = np.concatenate([before[~rough], np.tile(error[rough], 2)])[order]
        stale = np.concatenate([stale[~rough], np.tile(stale[rough], 2)])[order]


def _first_edges(horizon: float, breakpoints: np.ndarray) -> np.ndarray:
    """The breakpoints, and panels that double in y away from 0 where no breakpoint is near."""
    top, fixed = np.sqrt(horizon), np.sqrt(breakpoints)
    graded = top * 2.0 ** np.arange(-10, 0)
    apart = (np.abs(graded[:, None] - fixed) > 1e-3 * graded[:, None]).all(1)
    return np.unique(np.concatenate([[0.0, top], graded[apart], fixed]))


def _judge(panels: Panels, L: np.ndarray, R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every panel: which of CAUSES is resolved worst, its error relative to its rows, and by how much an error of F or
    GGᵀ changes Ψ or Σ, relative to them.
    """
    sigma = np.sqrt((L * L).sum(-1))
    low, high = sigma.min(1)[..., None], sigma.max(1)[..., None]
    errors, effects = [], []
    for error, missed, share in (
        (panels.error_F, panels.missed_F, np.fmax(1, high.swapaxes(-1, -2) / low)),
        (panels.error_GG, panels.missed_GG, 1 / (low * low.swapaxes(-1, -2))),
    ):
        effect = np.where(missed > 0, np.nan_to_num(missed * share), 0)
        errors.append(np.where(effect > NEGLIGIBLE, error, 0).max((1, 2, 3)))
        effects.append(effect.max((1, 2, 3)))
    for values in (panels.psi, R) if R.shape[-1] > 1 else (np.zeros_like(R), R):
        last, size = tail(values)
        errors.append((last / np.where(size > 0, size, 1)).max((1, 2, 3)))
    effect = np.max(effects, 0)
    cause = np.where(effect > STEEP, effects[0] <= STEEP, np.argmax(errors, 0))
    return cause, np.max(errors, 0), effect


def _polynomials(panels: Panels, R: np.ndarray) -> Polynomials:
    edges = np.append(panels.lower, panels.upper[-1])
    psi, R, F, GG = (at_points(TO_LEGENDRE, values) for values in (panels.psi, R, panels.F, panels.GG))
    if R.shape[-1] == 1:
        ahead = np.cumsum(panels.whole, 0) - panels.whole
        return Polynomials(edges, psi, R, F, GG, ahead, -ahead)
    ahead, back = [panels.whole], [np.linalg.inv(panels.whole)]
    while 2 ** len(ahead) < len(R):
        reach = 2 ** (len(ahead) - 1)
        for table, joined in ((ahead, lambda a, b: b @ a), (back, lambda a, b: a @ b)):
            table.append(np.concatenate([joined(table[-1][:-reach], table[-1][reach:]), table[-1][-reach:]]))
    return Polynomials(edges, psi, R, F, GG, np.stack(ahead), np.stack(back))


class _Scan:
    """F and GGᵀ at a fixed set of times, whatever the panels, as one number each: random weights on every entry."""

    def __init__(self, coefficients: Coefficients, panels: Panels):
        rng = np.random.default_rng(1)
        weights = []
        for values in (panels.F, panels.GG):
            size = np.abs(values).max((0, 1))
            size = np.maximum(size, 1e-6 * size.max((-2, -1), keepdims=True))
            weights.append(
                rng.uniform(0.5, 1, size.shape) * rng.choice([-1, 1], size.shape) / np.where(size > 0, size, 1)
            )
        self.weights = weights
        times = coefficients.scan_times()
        self.y, self.values = np.sqrt(times), coefficients.signature(times, (weights[0], weights[1]))

    def missed(self, panels: Panels, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """Of every panel, which function its polynomials miss most at some time, and by how much if not by rounding."""
        panel = np.searchsorted(panels.upper, self.y).clip(max=len(panels.upper) - 1)
        lower, upper = panels.lower[panel], panels.upper[panel]
        basis = np.polynomial.legendre.legvander((2 * self.y - lower - upper) / (upper - lower), NODES - 1)
        gaps = np.zeros((2, len(panels.upper)))
        for values, weight, exact, gap in zip((panels.F, panels.GG), self.weights, self.values, gaps, strict=True):
            found = np.einsum("pnsij,sij->pn", values, weight) @ TO_LEGENDRE.T
            scale = np.einsum("psij,sij->p", np.abs(values).max(1), np.abs(weight))[panel] + 1e-13 * weight.size
            np.maximum.at(gap, panel, np.abs((found[panel] * basis).sum(-1) - exact) / scale)
        return gaps.argmax(0), np.where(gaps.max(0) > max(SEEN, 100 * noise), gaps.max(0), 0)


def _refuse_values(panels: Panels) -> None:
    size = np.abs(panels.GG).max((1, 2, 3, 4))
    below = panels.negative < -1e-9 * np.maximum(size, 1e-6 * size.max())  # rounding of a 0 may be negative
    if below.any():
        time = panels.time[np.argmax(below)]
        raise ValueError(f"diffusion_squared is not positive semidefinite near t = {time:.6g}")


def _refuse_rates(panels: Panels, most: int) -> None:
    """Refuse at once a drift that takes more panels than fit."""
    needed, size = np.ceil(panels.rate).sum(), np.abs(panels.F).sum(-1).max((1, 2, 3))
    if needed > most:
        p = int(np.argmax(panels.rate))
        more = "" if panels.F.shape[-1] == 1 else " (k = 1 takes decays of any rate)"
        raise ValueError(
            f"drift has a rate of {size[p]:.3g} per unit of time near t = {panels.time[p]:.6g}, which takes "
            f"{needed:.0f} panels of time where {most} fit{more}: choose a slower drift or a smaller horizon"
        )


def _refuse_range(panels: Panels, L: np.ndarray) -> None:
    """Refuse a Σ that is 0 or infinite somewhere."""
    none = (L == 0).all((1, -2, -1)).any(1)
    if none.any():
        raise ValueError(
            f"diffusion_squared is 0 up to t = {panels.upper[none].max() ** 2:.3g} at least and so is initial_covariance: "
            "no noise, R = 0. Give a positive initial_covariance, or a diffusion_squared that is positive from 0 on"
        )
    large = ~(np.abs(L).max((1, 2, 3, 4)) < 1e150)
    grown = np.cumsum(panels.whole.max((1, 2, 3))) > 345 if L.shape[-1] == 1 else large
    if (large & grown).any():
        p = int(np.argmax(large & grown))
        raise ValueError(f"the covariance leaves the range of float64 near t = {panels.time[p]:.6g}: drift grows it")


def _refuse_singular(
    panels: Panels, cause: np.ndarray, effect: np.ndarray, rough: np.ndarray, finest: np.ndarray
) -> None:
    """Refuse what halving does not resolve because the coefficient has no limit there."""
    horizon, last = panels.upper[-1] ** 2, len(panels.upper) - 1
    sizes = np.stack([np.abs(values).max((1, 2, 3, 4)) for values in (panels.F, panels.GG)])
    grown = sizes > 1e3 * np.median(sizes, 1, keepdims=True)
    steep = rough & (effect > STEEP) & np.where(cause == 1, grown[1], grown[0])
    at_end = np.isin(np.arange(last + 1), (0, last)) & (panels.duration < 1e-12 * horizon)
    steep &= finest | at_end
    if steep.any():
        p = int(np.argmax(steep))
        where = {0: "the start, t = 0", last: f"the horizon, t = {horizon:.8g}"}.get(p, f"t = {panels.time[p]:.8g}")
        less = f". End before it, at horizon={0.999 * horizon:.6g} say" if p == last else ""
        raise ValueError(f"{CAUSES[cause[p]]} is singular at {where}: it grows without bound towards it{less}")


def _refuse_roughness(panels: Panels, cause: np.ndarray, error: np.ndarray, rough: np.ndarray) -> None:
    p = int(np.argmax(np.where(rough, error, 0)))
    raise ValueError(
        f"{CAUSES[cause[p]]} is not resolved near t = {panels.time[p]:.8g}: {len(rough)} panels leave an error of "
        f"{error[p]:.0e}. Give the times at which drift or diffusion_squared jump or kink as breakpoints=; noise, as of "
        "single precision, or fast oscillation does it too"
    )


def _tell(panels: Panels, cause: np.ndarray, noise: np.ndarray) -> None:
    """Warn of errors that halving did not shrink."""
    p = int(np.argmax(noise))
    if noise[p] > TOLD:
        warnings.warn(
            f"LinearSDE: {CAUSES[cause[p]]} is known only to {noise[p]:.0e} of its size near t = {panels.time[p]:.8g}, "
            "where smaller panels do not help. It is rounding in the coefficients, as from single precision or from a "
            "cancellation such as 1 − t near t = 1, or a change too sudden for times in float64 without breakpoints=",
            stacklevel=2,
        )
