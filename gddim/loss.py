"""Denoising score matching over a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray, Scalar, Shaped

from gddim.sde import AbstractLinearSDE
from gddim.sde.linalg import Array

T_MIN = 1e-5  # the smallest time that is trained on, as published


def draw_noise(
    sde: AbstractLinearSDE, x0: Float[Array, "batch *dims C"], key: PRNGKeyArray, power: float = 1.0
) -> tuple[Float[Array, " batch"], Float[Array, "batch *dims k C"], Array]:
    """For each example of a batch a time in [1e-5, T], uniform in `t^{1/power}`, `ε ~ N(0, I)`, and a key for dropout."""
    t_key, eps_key, net_key = jax.random.split(key, 3)
    batch = x0.shape[0]
    low, high = T_MIN ** (1 / power), sde.horizon ** (1 / power)
    t = jax.random.uniform(t_key, (batch,), x0.dtype, low, high) ** power
    eps = jax.random.normal(eps_key, (*x0.shape[:-1], sde.k, x0.shape[-1]), x0.dtype)
    return t, eps, jax.random.split(net_key, batch)


def denoising_loss(model: Any, x0: Shaped[Array, "batch *dims C"], key: PRNGKeyArray, power: float = 1.0) -> Scalar:
    """The batch's mean of `model.loss(x0, t, ε)` over the draws of `draw_noise`, in float32.

    `x0` is data in pixels, scaled; `model` an `EpsModel` or a `Denoiser`. Power 1 is the published `t ~ U[1e-5, T]`.
    Raises `ValueError` for data that are not floating, as bytes of images are.
    """
    x0 = jnp.asarray(x0)
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 is {x0.dtype}: scale to [−1, 1] first, images by gddim.data.to_unit")
    return jnp.mean(jax.vmap(model.loss)(x0, *draw_noise(model.sde, x0, key, power)))
