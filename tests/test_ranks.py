"""Colour images under several `vmap`s: what is right for one is right at ranks up to 7, and ends no process.

XLA:CPU of jaxlib 0.10.2 dies of a reduction over a tiny axis at rank 7, which an image of several channels reaches under
two maps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim.evaluation.likelihood import log_density
from gddim.samplers.inversion import Coder
from gddim.sde import CLD, VP, AbstractLinearSDE, Blurring, LinearSDE

SHAPE = (8, 8, 3)
COUPLED = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, -1.0, -1.0]])
THIRD = LinearSDE(lambda t: 3 * COUPLED, lambda t: np.diag([0.0, 0.0, 6.0]), np.diag([1e-3, 0.1, 0.1]))


def net(x, level, cond=None, *, key=None):
    """Of the pixels and of the level, and not linear."""
    return jnp.tanh(x + level)


def eps(model: gddim.Denoiser, x: Any, t: Any) -> Any:
    return model(model.sde.lift(x), t)


def seen_through(model: gddim.Denoiser, x: Any, t: Any) -> Any:
    return gddim.through(CLD(), lambda y, sigma: y / (1 + sigma))(CLD().lift(x), t)


def loss_gradient(model: gddim.Denoiser, x: Any, t: Any) -> Any:
    noise = jnp.ones((*x.shape[:-1], model.sde.k, 3))
    return jax.grad(lambda x: model.loss(x, t, noise))(x)


def sampled(model: gddim.Denoiser, x: Any, t: Any) -> Any:
    grid = gddim.power_grid(model.sde.horizon, 1e-2, 3)
    return gddim.sample(gddim.GDDIM(2), model.sde, model, model.sde.lift(x), grid) + t


def density(model: gddim.Denoiser, x: Any, t: Any) -> Any:
    return log_density(model, x, jax.random.key(0), t_min=0.1, rtol=0.3, atol=0.3) + t


def encoded(model: gddim.Denoiser, x: Any, t: Any) -> Any:
    coder = Coder.of(model, gddim.power_grid(model.sde.horizon, 1e-2, 3), 2)
    return coder.decode(coder.encode(coder.noised(x, jax.random.key(0)))) + t


EVERYTHING = (eps, seen_through, loss_gradient, sampled, density, encoded)
CASES = [
    pytest.param(sde, what, id=f"{name}-{what.__name__}", marks=[] if what in quick else pytest.mark.slow)
    for name, sde, quick in (
        ("CLD", CLD(), EVERYTHING),
        ("third order", THIRD, (eps,)),
        ("VP", VP(), ()),
        ("Blurring", Blurring(8), ()),
    )
    for what in EVERYTHING
]


@pytest.mark.parametrize(("sde", "what"), CASES)
def test_colour_images_under_three_maps(sde: AbstractLinearSDE, what: Callable[..., Any]):
    model = gddim.Denoiser(sde, net)
    batch = (2, 2, 3)
    x = 0.5 * jax.random.normal(jax.random.key(1), (*batch, *SHAPE))
    t = jnp.linspace(0.2, 0.9, 12).reshape(batch)
    one = lambda x, t: what(model, x, t)
    found = jax.jit(jax.vmap(jax.vmap(jax.vmap(one))))(x, t)
    flat = jax.jit(jax.vmap(one))(x.reshape(-1, *SHAPE), t.reshape(-1))
    assert np.all(np.isfinite(found))
    close = 1e-3 if what is density else 1e-4  # of adaptive steps
    np.testing.assert_allclose(found.reshape(flat.shape), flat, atol=close * float(jnp.abs(flat).max()))


@pytest.mark.parametrize("rank", [4, 5, 6, 7])
def test_a_state_may_have_any_number_of_positions(rank: int):
    """The dims of a process that is the same everywhere are free: `(2, 9, 8, 8, 2, 3)` is one state of rank 6."""
    model = gddim.Denoiser(CLD(), net)
    u = jax.random.normal(jax.random.key(0), (3, 2, 9, 8, 8, 2, 3)[-rank:])
    t = jnp.asarray(0.5)
    found = jax.jit(model)(u, t).reshape(-1, 8, 2, 3)
    rows = jax.jit(jax.vmap(model, (0, None)))(u.reshape(-1, 8, 2, 3), t)
    np.testing.assert_allclose(found, rows, atol=1e-4 * float(jnp.abs(rows).max()))
