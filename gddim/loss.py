"""Denoising score matching over a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

T_MIN = 1e-5  # the smallest time that is trained on, as published


def denoising_loss(model: Any, x0: Float[Array, "batch *dims C"], key: PRNGKeyArray) -> Scalar:
    """The batch's mean of `model.loss(x0, t, ε)`, `t ~ U[1e-5, T]` and `ε ~ N(0, I)` for each example, in float32.

    `x0` is data in pixels, scaled; `model` an `EpsModel` or a `Denoiser`.
    """
    sde = model.sde
    t_key, eps_key, net_key = jax.random.split(key, 3)
    batch = x0.shape[0]
    t = jax.random.uniform(t_key, (batch,), x0.dtype, T_MIN, sde.horizon)
    eps = jax.random.normal(eps_key, (*x0.shape[:-1], sde.k, x0.shape[-1]), x0.dtype)
    return jnp.mean(jax.vmap(model.loss)(x0, t, eps, jax.random.split(net_key, batch)))
