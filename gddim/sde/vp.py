"""The variance-preserving SDE, DDPM in continuous time, and the sub-VP SDE."""

from __future__ import annotations

import math
from typing import Any, ClassVar, SupportsFloat

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from gddim.sde.base import AbstractLinearSDE, Time
from gddim.sde.linalg import Array, as_times
from gddim.sde.path import AbstractPath, CosineVP, DiscreteVP


class VP(AbstractLinearSDE):
    """`du = −½β(t) u dt + √β(t) dw`, `β(t) = β_min + (β_max − β_min) t`: Song et al. 2021 (arXiv 2011.13456) Eq. 11.

    `beta_min`, `beta_max`: β at t = 0 and at t = 1, per unit of time.
    `horizon`: T, the time at which sampling starts.

    Raises `ValueError` for `beta_min < 0`, a β that turns negative within the horizon or is 0 all along, `horizon ≤ 0`.
    """

    beta_min: float = eqx.field(default=0.1, static=True, converter=float)
    """β at t = 0, per unit of time."""
    beta_max: float = eqx.field(default=20.0, static=True, converter=float)
    """β at t = 1, per unit of time."""
    horizon: float = eqx.field(default=1.0, static=True, converter=float)
    """T, the time at which sampling starts."""
    k: ClassVar[int] = 1

    def __check_init__(self) -> None:
        _check_betas(self)

    @staticmethod
    def cosine(offset: SupportsFloat = 0.008, horizon: SupportsFloat = 0.9946) -> CosineVP:
        """The cosine schedule: `α_t = cos((t+s)/(1+s)·π/2) / cos(s/(1+s)·π/2)`, s the offset, on [0, horizon]."""
        return CosineVP(offset=offset, horizon=horizon)

    @staticmethod
    def from_betas(betas: Any, horizon: SupportsFloat | None = None) -> DiscreteVP:
        """The path of a network trained at N discrete times: `α_i² = ∏_{j≤i} (1 − β_j)`, i = 1 … N, log α linear between.

        `betas`: (N,), in (0, 1). Discrete time i is `t = i/N·horizon`; by default the horizon is N, so that t is i itself.
        Libraries that count from 0 (diffusers) call i − 1 what is i here, where 0 is the data. Raises `ValueError`.

        >>> path = VP.from_betas(np.linspace(1e-4, 0.02, 1000))
        >>> bool(np.isclose(path.noise_factor(1.0), np.sqrt(1e-4))), path.horizon
        (True, 1000.0)
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return _discrete(np.cumsum(np.log1p(-np.asarray(betas, np.float64).reshape(-1))) / 2, horizon)

    @staticmethod
    def from_alphas(alphas_cumprod: Any, horizon: SupportsFloat | None = None) -> DiscreteVP:
        """`from_betas` of the cumulative products `α_i²` (diffusers' `alphas_cumprod`), (N,), falling within (0, 1)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return _discrete(np.log(np.asarray(alphas_cumprod, np.float64).reshape(-1)) / 2, horizon)

    def transition(self, t: Time, s: Time) -> Array:
        xp, t, s = as_times(t, s)
        integral = (t - s) * (self.beta_min + (self.beta_max - self.beta_min) * (t + s) / 2)
        return xp.exp(-integral / 2)[..., None, None]

    def noise_factor(self, t: Time) -> Array:
        xp, t = as_times(t)
        integral = t * (self.beta_min + (self.beta_max - self.beta_min) * t / 2)
        return xp.sqrt(-xp.expm1(-integral))[..., None, None]

    def to_pixels(self, u: Array) -> Array:
        return u

    def from_pixels(self, x: Array) -> Array:
        return jnp.asarray(x)


class SubVP(AbstractPath):
    """`du = −½β(t) u dt + √(β(t)(1 − e^{−2B})) dw`, `B = ∫_0^t β`, of less variance than VP: Song et al. 2021 Eq. 13.

    `α = e^{−B/2}`, `σ = 1 − e^{−B}`. Takes and raises what `VP` does.
    """

    beta_min: float = eqx.field(default=0.1, static=True, converter=float)
    """β at t = 0, per unit of time."""
    beta_max: float = eqx.field(default=20.0, static=True, converter=float)
    """β at t = 1, per unit of time."""
    horizon: float = eqx.field(default=1.0, static=True, converter=float)
    """T, the time at which sampling starts."""

    def __check_init__(self) -> None:
        _check_betas(self)

    def alpha_sigma(self, xp: Any, t: Array) -> tuple[Array, Array]:
        integral = t * (self.beta_min + (self.beta_max - self.beta_min) * t / 2)
        return xp.exp(-integral / 2), -xp.expm1(-integral)


def _check_betas(sde: VP | SubVP) -> None:
    at_horizon = sde.beta_min + (sde.beta_max - sde.beta_min) * sde.horizon
    both = sde.beta_min + at_horizon
    if not (sde.horizon > 0 and sde.beta_min >= 0 and at_horizon >= 0 and 0 < both < math.inf):
        raise ValueError(
            f"{type(sde).__name__}(beta_min={sde.beta_min}, beta_max={sde.beta_max}, horizon={sde.horizon}): "
            "β(t) must be finite and ≥ 0 on [0, horizon] and not 0 throughout, and the horizon > 0"
        )


def _discrete(log_alphas: np.ndarray, horizon: SupportsFloat | None) -> DiscreteVP:
    return DiscreteVP(log_alphas=tuple(log_alphas), horizon=len(log_alphas) if horizon is None else horizon)
