"""Processes of one field, each from a pair of functions of time: `u_t = α_t u_0 + σ_t n`."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, SupportsFloat

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gddim.sde.base import AbstractLinearSDE, Time
from gddim.sde.host import in_float64
from gddim.sde.linalg import Array, as_times


class AbstractPath(AbstractLinearSDE):
    """`Ψ(t, s) = α_t/α_s` and `R_t = σ_t`, from a pair (α, σ) with α_0 > 0 and σ/α nowhere falling.

    For k = 1, R is σ whatever it starts from: with `Σ = σ²` and `F = α'/α`, `Σ' = 2FΣ + GGᵀ` says
    `σ' = Σ'/2σ = (F + ½ GGᵀ/Σ) σ`, which is the equation of R, and `Σ_0 = σ_0²` is the covariance of the state at t = 0.

    Where α reaches 0 at the horizon (flow matching), Ψ(t, T) has no finite value for t < T: it is ∞, so that `1/Ψ(t, T) = 0`
    is `Ψ(T, t)`, F_T is −∞, and `Ψ(T, T) = 1`. Samplers start at such a T when they use the data prediction, which needs
    `Ψ(·, 0)` alone.
    """

    k: ClassVar[int] = 1

    @abc.abstractmethod
    def alpha_sigma(self, xp: Any, t: Array) -> tuple[Array, Array]:
        """α and σ at an array of times of the namespace `xp`, both of its shape."""

    def transition(self, t: Time, s: Time) -> Array:
        xp, t, s = as_times(t, s)
        late, early = self.alpha_sigma(xp, t)[0], self.alpha_sigma(xp, s)[0]
        late, early = xp.broadcast_arrays(late, early)
        gone = early == 0
        # √α is 0 where 1 stands, and of infinite slope there: so F is not finite, and no sampler takes it for 0
        from_nothing = xp.where(late == 0, 1.0, xp.inf).astype(late.dtype) + xp.sqrt(xp.where(gone, late, 1))
        return xp.where(gone, from_nothing, late / xp.where(gone, 1, early))[..., None, None]

    def noise_factor(self, t: Time) -> Array:
        xp, t = as_times(t)
        return self.alpha_sigma(xp, t)[1][..., None, None]

    def to_pixels(self, u: Array) -> Array:
        return u

    def from_pixels(self, x: Array) -> Array:
        return jnp.asarray(x)


class GaussianPath(AbstractPath):
    """`u_t = α_t u_0 + σ_t n` of any pair of functions of time: `F = α'/α`, `GGᵀ = α² (σ²/α²)'`, `R = σ`.

    `alpha`, `sigma`: functions of t, elementwise, in `numpy`, `jax.numpy` or plain arithmetic; derivatives are found by
    differentiating them. `σ_0 > 0` is allowed: it is noise on the data at t = 0, `Σ_0 = σ_0²`. `α_0` should be 1: data enter
    as `u_0 = x_0`, and `Ψ(t, 0) = α_t/α_0`.
    `horizon`: T, the time at which sampling starts.

    Raises `ValueError` unless, on [0, horizon], both are finite, α > 0 (it may be 0 at the horizon), σ ≥ 0, and σ/α
    nowhere falls.

    >>> path = GaussianPath(lambda t: np.exp(-t), lambda t: np.sqrt(-np.expm1(-2 * t)), horizon=5.0)
    >>> path.diffusion_squared(0.3)  # the Ornstein–Uhlenbeck process du = −u dt + √2 dw
    array([[2.]])
    """

    alpha: Callable[[Any], Any] = eqx.field(static=True)
    """α, the amplitude of the data."""
    sigma: Callable[[Any], Any] = eqx.field(static=True)
    """σ, the standard deviation of the noise."""
    horizon: float = eqx.field(static=True)
    """T, the time at which sampling starts."""

    def __init__(self, alpha: Callable[[Any], Any], sigma: Callable[[Any], Any], horizon: SupportsFloat = 1.0):
        self.alpha, self.sigma, self.horizon = alpha, sigma, float(horizon)

    def __check_init__(self) -> None:
        if not 0 < self.horizon < math.inf:
            raise ValueError(f"GaussianPath: horizon={self.horizon} must be > 0 and finite")
        with np.errstate(all="ignore"):
            alpha, sigma = self.alpha_sigma(np, self.horizon * np.linspace(0, 1, 257))
            ratio = sigma[:-1] / alpha[:-1]
        for name, value, good in (("alpha", alpha, alpha[:-1] > 0), ("sigma", sigma, sigma[1:] > 0)):
            if not (np.all(np.isfinite(value)) and np.all(good) and np.all(value >= 0)):
                raise ValueError(f"GaussianPath: {name} must be finite and > 0 within [0, {self.horizon}]")
        if np.any(np.diff(ratio) < -1e-9 * ratio[1:]):
            raise ValueError("GaussianPath: sigma/alpha must not fall with t: a diffusion only adds noise")

    def alpha_sigma(self, xp: Any, t: Array) -> tuple[Array, Array]:
        return _evaluated(self.alpha, t), _evaluated(self.sigma, t)


class VE(AbstractPath):
    """`u_t = u_0 + t n`: the variance-exploding path with time = σ, of Karras et al. 2022 (EDM, arXiv 2206.00364).

    `sigma_max`: the noise at the horizon, and the horizon. Raises `ValueError` unless it is > 0.

    Its grid is `power_grid(80.0, 0.002, steps, power=7)`.
    """

    sigma_max: float = eqx.field(static=True)
    """Standard deviation of the noise at the horizon, and the horizon."""
    grid_end: ClassVar[float] = 0.002 / 80
    grid_power: ClassVar[float] = 7.0

    def __init__(self, sigma_max: SupportsFloat = 80.0):
        self.sigma_max = float(sigma_max)
        if not 0 < self.sigma_max < math.inf:
            raise ValueError(f"VE: sigma_max={self.sigma_max} must be > 0 and finite")

    @property
    def horizon(self) -> float:
        return self.sigma_max

    def alpha_sigma(self, xp: Any, t: Array) -> tuple[Array, Array]:
        return xp.ones_like(t), t


class FlowMatching(AbstractPath):
    """`u_t = (1 − t) u_0 + t n`: the straight path of flow matching and rectified flow (Lipman et al. 2023, arXiv 2210.02747).

    Nothing is left of the data at t = 1: samplers start there when they use the data prediction, others below. Networks of
    this path predict the velocity `n − x_0`: see `as_denoiser`.

    `horizon`: T, the time at which sampling starts. Raises `ValueError` for one outside (0, 1].
    """

    horizon: float = eqx.field(default=1.0, static=True, converter=float)
    """T, the time at which sampling starts, in (0, 1]."""

    def __check_init__(self) -> None:
        if not 0 < self.horizon <= 1:
            raise ValueError(f"FlowMatching: horizon={self.horizon} must lie in (0, 1]")

    def alpha_sigma(self, xp: Any, t: Array) -> tuple[Array, Array]:
        return 1 - t, t


class CosineVP(AbstractPath):
    """`α_t = cos((t+s)/(1+s)·π/2) / cos(s/(1+s)·π/2)`, `σ² = 1 − α²`: Nichol, Dhariwal 2021 (arXiv 2102.09672) Eq. 17.

    Written with sines of differences, so that float32 has σ near 0 and α near 1 to full relative precision. Raises
    `ValueError` outside the ranges.
    """

    offset: float = eqx.field(default=0.008, static=True, converter=float)
    """s, > 0."""
    horizon: float = eqx.field(default=0.9946, static=True, converter=float)
    """T ≤ 1. At 1 nothing is left of the data; DPM-Solver's T, where `σ/α` is 119, is the default."""

    def __check_init__(self) -> None:
        if not (0 < self.offset < math.inf and 0 < self.horizon <= 1):
            raise ValueError(f"VP.cosine: offset={self.offset} must be > 0, horizon={self.horizon} in (0, 1]")

    def alpha_sigma(self, xp: Any, t: Array) -> tuple[Array, Array]:
        rate = math.pi / 2 / (1 + self.offset)
        start = self.offset * rate
        at_0 = math.cos(start)
        return xp.sin((1 - t) * rate) / at_0, xp.sqrt(xp.sin(t * rate) * xp.sin(t * rate + 2 * start)) / at_0


class DiscreteVP(AbstractPath):
    """`σ² = 1 − α²`, log α linear in t between given values: what a network that was trained at N discrete times saw.

    Exact at `t = i/N·horizon`, as in DPM-Solver (Lu et al. 2022, arXiv 2206.00927). Made by `VP.from_betas` and
    `VP.from_alphas`. Raises `ValueError` unless log α falls strictly from 0 and is finite.
    """

    log_alphas: tuple[float, ...] = eqx.field(static=True, converter=lambda values: tuple(map(float, values)))
    """log α at the discrete times 1 … N; at 0 it is 0."""
    horizon: float = eqx.field(default=1.0, static=True, converter=float)
    """T, the time of the last."""

    def __check_init__(self) -> None:
        if not (0 < self.horizon < math.inf and len(self.log_alphas)):
            raise ValueError(f"DiscreteVP: horizon={self.horizon} must be > 0, and at least one value be given")
        if not np.all(np.diff(self.log_alphas, prepend=0.0) < 0) or not math.isfinite(self.log_alphas[-1]):
            raise ValueError("VP of discrete times: all betas, and all ratios of successive alphas, must lie in (0, 1)")

    def alpha_sigma(self, xp: Any, t: Array) -> tuple[Array, Array]:
        knots = np.linspace(0, self.horizon, len(self.log_alphas) + 1)
        values = np.append(0.0, self.log_alphas)
        log_alpha = xp.interp(t, xp.asarray(knots, t.dtype), xp.asarray(values, t.dtype))
        return xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))


def _evaluated(fn: Callable[[Any], Any], t: Array) -> Array:
    """A user's elementwise function at times, however it is written: float64 at NumPy times, traceable at JAX times."""
    if isinstance(t, np.ndarray):
        try:
            value = fn(t)
        except TypeError as error:
            raise ValueError(
                f"a function of time must take arrays, as those of numpy do and of math do not: {error}"
            ) from error
        return in_float64(fn, t) if isinstance(value, jax.Array) else np.broadcast_to(np.float64(value), t.shape)
    try:
        value = fn(t)
    except jax.errors.TracerArrayConversionError:
        value = fn(_AsNumPy(t)).value
    return jnp.broadcast_to(jnp.asarray(value, t.dtype), t.shape)


class _AsNumPy(np.lib.mixins.NDArrayOperatorsMixin):
    """A JAX array that NumPy's functions take: they answer with those of `jax.numpy` of the same names."""

    def __init__(self, value: Array):
        self.value = value

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return self.__array_function__(ufunc, (), inputs, options)

    def __array_function__(self, function: Any, types: Any, inputs: tuple, options: dict) -> Any:
        plain = [x.value if isinstance(x, _AsNumPy) else x for x in inputs]
        return _AsNumPy(getattr(jnp, function.__name__)(*plain, **options))
