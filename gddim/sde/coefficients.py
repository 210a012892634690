"""A user's F and GGᵀ in float64: at any times, at one position of each kind."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gddim.sde.collocation import GAUSS_NODES
from gddim.sde.host import float64_on_cpu, in_float64
from gddim.sde.linalg import transpose

Coefficient = Callable[[Any], Any]  # of a scalar time, to (*#dims, k, k)
SCAN = 2**14  # times at which the polynomials are compared with the functions, whatever the panels
SAME = 1e-12  # positions whose coefficients agree to this much of their size are of one kind


def checked(name: str, value: np.ndarray) -> np.ndarray:
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{name} has shape {value.shape}; it must be (*dims, k, k)")
    if not np.all(np.isfinite(value)):
        raise ValueError(f"{name} is not finite")
    return value


class ToldApart(Exception):
    """Positions that were of one kind differ at some time: what was solved for the old kinds is void."""


class Coefficients:
    """`drift` and `diffusion_squared` at arrays of times.

    Positions whose coefficients are equal, as those of the frequencies (i, j) and (j, i) of an image, are of one kind and
    are solved as one. `first`: one position of each kind, `(kinds,)`; `kind`: the kind of every position, `#dims`. Equality
    is checked at every time that is asked for; where it fails, kinds are split and `ToldApart` is raised.
    """

    def __init__(self, drift: Coefficient, diffusion_squared: Coefficient, covariance: np.ndarray, horizon: float):
        self.functions = {"drift": drift, "diffusion_squared": diffusion_squared}
        self.covariance, self.shape, self.horizon = covariance, covariance.shape, horizon
        self._time_by_time: set[str] = set()
        self._known = [covariance.reshape(-1, covariance.shape[-1] ** 2)]
        self._kinds: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def kinds(self) -> tuple[np.ndarray, np.ndarray]:
        if self._kinds is None:
            if len(self._known) == 1:
                for _, values in self._pieces(self.horizon * (1 + GAUSS_NODES) / 2):
                    self._tell_apart(*(v[:, index] for v, index in values))
            _, first, kind = np.unique(np.concatenate(self._known, -1), axis=0, return_index=True, return_inverse=True)
            kind = kind.astype(np.int32)  # a traced index that fits with JAX's, with float64 turned on and off
            self._kinds = first, kind.reshape(self.shape[:-2])
        return self._kinds

    def _tell_apart(self, *rows: np.ndarray) -> None:
        """Let values `(times, positions, k, k)` count in what makes a kind."""
        self._known += [v.swapaxes(0, 1).reshape(v.shape[1], -1) for v in rows]
        self._kinds = None

    def at(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """F and GGᵀ at an array of times, `(*tau.shape, kinds, k, k)`."""
        first, kind = self.kinds
        tau = np.minimum(tau, np.nextafter(self.horizon, 0))  # which the square of a root may round to
        found = tuple(np.empty((tau.size, len(first), *self.shape[-2:])) for _ in self.functions)
        for start, values in self._pieces(tau.reshape(-1)):
            for whole, (v, index) in zip(found, values, strict=True):
                part = whole[start : start + len(v)]
                part[:] = v[:, index[first]]
                if v.shape[1] > 1:
                    rows, merged = v[:, index], part[:, kind.reshape(-1)]
                    apart = (rows != merged).any() and np.abs(rows - merged).max((1, 2, 3)) > SAME * np.abs(rows).max(
                        (1, 2, 3)
                    )
                    if np.any(apart):
                        self._tell_apart(rows[np.flatnonzero(apart)[:16]])
                        raise ToldApart
        F, GG = (whole.reshape(*tau.shape, *whole.shape[1:]) for whole in found)
        return F, GG

    def signature(self, tau: np.ndarray, weights: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """`Σ weights · F` and `Σ weights · GGᵀ` over kinds and entries, weights `(kinds, k, k)`. Returns `(2, times)`.

        Every position counts with its kind's weight over the number of its positions.
        """
        kind = self.kinds[1].reshape(-1)
        shared = [w[kind] / np.bincount(kind)[kind, None, None] for w in weights]
        found = np.empty((2, len(tau)))
        for start, values in self._pieces(tau):
            for row, (v, index), weight in zip(found, values, shared, strict=True):
                own = np.zeros(v.shape[1:])
                np.add.at(own, index, weight)
                row[start : start + len(v)] = v.reshape(len(v), -1) @ own.reshape(-1)
        return found

    def scan_times(self) -> np.ndarray:
        """Times of (0, horizon) at distances below 1.5 horizon / SCAN; fewer where a time has more than SCAN entries."""
        count = max(2**10, min(SCAN, SCAN**2 // int(np.prod(self.shape))))
        jitter = np.random.default_rng(0).uniform(-0.25, 0.25, count)
        return self.horizon * (np.arange(count) + 0.5 + jitter) / count

    def sizes(self) -> Iterator[tuple[str, float]]:
        """The root mean squares of F, GGᵀ and the covariance: what tells one process from another."""
        for _, ((F, _), (GG, _)) in self._pieces(self.horizon * (1 + GAUSS_NODES) / 2):
            for name, v in dict(F=F, GG=GG, start=self.covariance).items():
                yield name, float(np.sqrt(np.mean(v**2)))

    def _pieces(self, tau: np.ndarray) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray]]]]:
        """For a piece of the times after the other: where it starts, and of each function its values at the positions that
        it has of its own, `(times, own, k, k)`, and which of them every position has, `(positions,)`.
        """
        *dims, k, _ = self.shape
        size = 1 << int(np.clip(2**21 // np.prod(self.shape), 16, 2**11)).bit_length() - 1  # one shape, compiled once
        for start in range(0, len(tau), size):
            times, pieces = tau[start : start + size], []
            for name in self.functions:
                v = self._values(name, times, size)
                own = (1,) * (len(self.shape) + 1 - v.ndim) + v.shape[1:-2]
                index = np.broadcast_to(np.arange(np.prod(own, dtype=int)).reshape(own), dims).reshape(-1)
                pieces.append((v.reshape(len(times), -1, k, k), index))
            yield start, pieces

    def _values(self, name: str, times: np.ndarray, size: int) -> np.ndarray:
        """One function at up to `size` times, `(times, *own dims, k, k)`, symmetric if it is GGᵀ."""
        fn = self.functions[name]
        if name not in self._time_by_time:
            try:
                values = in_float64(fn, np.pad(times, (0, size - len(times)), mode="edge"))[: len(times)]
            except (TypeError, AttributeError, IndexError):  # not written for tracing; its own errors come again below
                self._time_by_time.add(name)
        if name in self._time_by_time:
            with float64_on_cpu():
                values = np.asarray([np.asarray(fn(t), np.float64) for t in times])
        good = np.isfinite(values).reshape(len(times), -1).all(1)
        if not good.all():
            raise ValueError(f"{name} is not finite at t = {times[~good][0]:.8g}, in (0, {self.horizon}]")
        checked(name, values[0])
        values = np.where(np.abs(values) < 1e-290, 0, values)  # arithmetic on subnormal numbers is slow
        if name == "diffusion_squared":
            odd = np.abs(values - transpose(values)).reshape(len(times), -1).max(1)
            if np.any(odd > 1e-6 * np.abs(values).max()):
                raise ValueError(f"diffusion_squared is not symmetric at t = {times[odd.argmax()]:.8g}")
            values = (values + transpose(values)) / 2
        return values
