"""The variance-preserving SDE: DDPM in continuous time."""

from __future__ import annotations

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from gddim.sde.base import AbstractLinearSDE, Time
from gddim.sde.linalg import Array, as_times


class VP(AbstractLinearSDE):
    """`du = −½β(t) u dt + √β(t) dw`, `β(t) = β_min + (β_max − β_min) t`: Song et al. 2021 (arXiv 2011.13456) Eq. 11.

    Raises `ValueError` for `beta_min < 0`, `beta_max ≤ 0`, a β that turns negative within the horizon, `horizon ≤ 0`.
    """

    beta_min: float = eqx.field(default=0.1, static=True, converter=float)
    """β at t = 0, per unit of time."""
    beta_max: float = eqx.field(default=20.0, static=True, converter=float)
    """β at t = 1, per unit of time."""
    horizon: float = eqx.field(default=1.0, static=True, converter=float)
    """T, the time at which sampling starts."""
    k: ClassVar[int] = 1

    def __check_init__(self) -> None:
        at_horizon = self.beta_min + (self.beta_max - self.beta_min) * self.horizon
        both = self.beta_min + at_horizon
        if not (self.horizon > 0 and self.beta_min >= 0 and at_horizon >= 0 and 0 < both < math.inf):
            raise ValueError(
                f"VP(beta_min={self.beta_min}, beta_max={self.beta_max}, horizon={self.horizon}): "
                "β(t) must be finite and ≥ 0 on [0, horizon] and not 0 throughout, and the horizon > 0"
            )

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
