"""Coefficients by position, of one size or of all: what a process may leave out, and what it may not be given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim import GDDIM


class Coloured(gddim.AbstractLinearSDE):
    """VP with more noise at some positions: a signal that is the same at all, of one size or none, and an R that is not."""

    signal_dims: tuple[int, ...] = ()
    k: int = 1
    horizon: float = 1.0

    def transition(self, t, s):
        return gddim.VP().transition(t, s).reshape(*np.shape(t), *self.signal_dims, 1, 1)

    def noise_factor(self, t):
        R = gddim.VP().noise_factor(t).reshape(*np.shape(t), 1, 1, 1, 1)
        return R * np.linspace(1, 2, 6).reshape(2, 3, 1, 1)

    def to_pixels(self, u):
        return u

    def from_pixels(self, x):
        return x


@pytest.mark.parametrize("last", ["none", "euler", "data"])
@pytest.mark.parametrize(
    "sampler",
    [GDDIM(2), GDDIM(2, corrector=True), GDDIM(2, 0.5), GDDIM(2, interpolate="data"), GDDIM(2, interpolate="residual"),
     gddim.EulerMaruyama(), gddim.EulerMaruyama(0.5), gddim.Heun()],
    ids=repr,
)  # fmt: skip
def test_of_what_is_the_same_at_all_positions_the_dims_may_be_left_out(sampler, last):
    eps_fn, u = lambda u, t: jnp.tanh(u), jnp.linspace(-1, 1, 18).reshape(2, 3, 1, 3)
    draw = lambda sde: gddim.sample(sampler, sde, eps_fn, u, [1.0, 0.5, 0.1], jax.random.key(0), last)
    whole = draw(Coloured((1, 1)))
    np.testing.assert_allclose(draw(Coloured()), whole, rtol=1e-6)
    assert whole.shape == u.shape


def test_a_state_is_refused_for_dims_that_the_noise_alone_has():
    for call in (lambda: Coloured().check_state(jnp.ones((5, 7, 1, 3))),
                 lambda: gddim.sample(GDDIM(1), Coloured(), jnp.multiply, jnp.ones((5, 7, 1, 3)), [1.0, 0.1])):  # fmt: skip
        with pytest.raises(ValueError, match=r"takes \(2, 3, 1, C\)"):
            call()
    with pytest.raises(ValueError, match="ratio per frequency"):
        gddim.samplers.log_snr_grid(Coloured(), 1.0, 0.1, 3)


def test_coefficients_of_size_1_are_of_data_of_any_size():
    sde = gddim.LinearSDE(lambda t: -np.ones((1, 1, 1, 1)), lambda t: 2 * np.ones((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)))
    u = jnp.ones((8, 4, 1, 3))
    assert gddim.sample(GDDIM(2), sde, lambda u, t: jnp.tanh(u), u, [1.0, 0.1]).shape == u.shape


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD(), gddim.Blurring(4)], ids=repr)
def test_bytes_are_no_data_and_no_state(sde):
    x, u = jnp.ones((4, 4, 1), jnp.uint8), jnp.ones((4, 4, sde.k, 1), jnp.int32)
    with pytest.raises(ValueError, match="x0 has dtype uint8; accepted are floating"):
        sde.lift(x)
    with pytest.raises(ValueError, match="u0 has dtype int32; accepted are floating"):
        sde.perturb(u, 0.3, u.astype(jnp.float32))
