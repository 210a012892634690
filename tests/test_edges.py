"""Samplers at their edges: few steps, close times, a grid down to 0, half precision. No disaster goes without a word."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from experiments.processes import phase_space_langevin
from gddim import GDDIM
from gddim.check import mixture_eps
from gddim.samplers.quadrature import history_nodes, lagrange
from gddim.sde.linalg import inverse, product

PROCESSES = {"VP": gddim.VP(), "CLD": gddim.CLD(), "PSLD": phase_space_langevin()}
EPS_CORRECTORS = [GDDIM(q, lam, corrector=True) for q in (1, 2, 4) for lam in (0.0, 0.3, 1.0)]
# a gap of 1e-6 beside 0.7, of 1e-5 beside 0.1: what rounding makes of times that were meant to be one
CLOSE = np.array([1.0, 0.85, 0.7 + 1e-6, 0.7, 0.5, 0.3, 0.1 + 1e-5, 0.1, 0.02, 1e-3])


class Point(eqx.Module):
    """The exact ε for data that are one point."""

    sde: gddim.AbstractLinearSDE = eqx.field(static=True)
    u0: jax.Array

    def __call__(self, u, t):
        R, psi = jnp.asarray(self.sde.noise_factor(t)), jnp.asarray(self.sde.transition(t, 0.0))
        return product(inverse(R), u - product(psi, self.u0))


def error(sampler, sde, grid, dtype=jnp.float32):
    """How far samples end from where they must, in the data: the path of their ε at λ = 0, else the point itself."""
    rng, dims = np.random.default_rng(0), np.shape(sde.transition(1.0, 0.0))[:-2]
    u0 = np.asarray(jax.vmap(sde.lift)(jnp.asarray(rng.uniform(-1, 1, (8, *dims, 3)), jnp.float32)))
    eps = rng.normal(size=u0.shape)
    begin = jnp.asarray(product(sde.transition(grid[0], 0.0), u0) + product(sde.noise_factor(grid[0]), eps), dtype)
    keys = jax.random.split(jax.random.key(1), len(u0))
    draw = lambda u0, u, key: gddim.sample(sampler, sde, Point(sde, u0), u, grid, key)
    found = jax.vmap(draw)(jnp.asarray(u0, dtype=jnp.float32), begin, keys)
    assert found.dtype == dtype
    first = np.asarray(begin, np.float64) - product(sde.transition(grid[0], 0.0), u0)  # the start as it was rounded
    drawn = product(sde.noise_factor(grid[-1]), product(inverse(sde.noise_factor(grid[0])), first))
    exact = product(sde.transition(grid[-1], 0.0), u0) + (0 if getattr(sampler, "lam", 0) else drawn)
    return np.abs(np.asarray(found, np.float64) - exact)[..., 0, :].max()


@pytest.mark.parametrize("name", ["VP", "CLD", pytest.param("PSLD", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", EPS_CORRECTORS, ids=str)
def test_the_corrector_of_eps_is_never_worse_than_its_prediction_at_few_steps(name, sampler):
    """In float32 over 1 step of CLD it was off by 4e4, at λ = 1 by 5e11; at λ = 1 by 1e3 over 10 steps still."""
    sde, predictor = PROCESSES[name], GDDIM(sampler.order, sampler.lam)
    for steps in (1, 2, 4, 10):
        grid = gddim.power_grid(1.0, 1e-3, steps)
        assert error(sampler, sde, grid) < 2 * error(predictor, sde, grid) + 1e-3 < 0.1


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_the_corrector_of_eps_is_bounded_on_a_mixture_in_float64(lam, steps):
    """It amplified the prediction's own error, not only rounding: at λ = 1 on CLD states grew to thousands."""
    sde, grid = PROCESSES["CLD"], gddim.power_grid(1.0, 1e-3, steps)
    with jax.enable_x64(True):
        eps_fn = mixture_eps(sde, np.array([[-0.8, 0.8], [0.8, 0.8]]), 0.1)
        us = jnp.stack([sde.sample_prior(jax.random.key(i), (2, 2)) for i in range(32)]).astype(float)
        draw = lambda u, key: gddim.sample(GDDIM(2, lam, corrector=True), sde, eps_fn, u, grid, key)
        assert jnp.abs(jax.vmap(draw)(us, jax.random.split(jax.random.key(2), 32))[:, 0]).max() < 4


def test_the_table_says_what_each_step_is_and_keeps_the_corrector_where_it_improves():
    few, many = (GDDIM(2, corrector=True).coefficients(gddim.CLD(), gddim.power_grid(1.0, 1e-3, n)) for n in (2, 50))
    assert few.corrected.tolist() == [False, False]
    assert many.corrected.all()
    assert many.orders.tolist() == [1] + [2] * 49
    for sampler in (GDDIM(4), GDDIM(4, interpolate="data"), gddim.CholeskyMultistep(4)):
        assert sampler.coefficients(gddim.CLD(), CLOSE).orders.tolist() == [1, 2, 3, 3, 3, 3, 4, 3, 3]
        assert sampler.coefficients(gddim.CLD(), gddim.power_grid(1.0, 1e-3, 6)).orders.tolist() == [1, 2, 3, 4, 4, 4]
    data = GDDIM(2, 1.0, corrector=True, interpolate="data").coefficients(gddim.CLD(), gddim.power_grid(1.0, 1e-3, 2))
    assert data.corrected.all()


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD(), gddim.Blurring(4)], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("interpolate", ["eps", "data"])
@pytest.mark.parametrize("order", [3, 4])
def test_close_times_amplify_nothing(sde, order, interpolate):
    """The error of float32 was up to 2e4: a difference of two calls of ε over a gap of 1e-6 is its rounding."""
    assert error(GDDIM(order, interpolate=interpolate), sde, CLOSE) < 1e-3
    assert error(GDDIM(order, interpolate=interpolate), sde, np.array([1.0, 0.7 + 1e-6, 0.7, 1e-3])) < 0.1


@pytest.mark.parametrize("order", [2, 3, 4])
def test_l_at_close_times_too(order):
    assert error(gddim.CholeskyMultistep(order), gddim.VP(), CLOSE) < 1e-3  # where L = R


@pytest.mark.parametrize("ts", [CLOSE, CLOSE[::-1]], ids=["falling", "rising"])
def test_the_nodes_of_a_step_amplify_at_most_so_much(ts):
    """`Σ_j |ℓ_j(s)|` was 7e5 at order 4; every grid in use stays as it is."""
    value, _ = lagrange(history_nodes(ts, 4), ts[1:, None])
    assert np.abs(value).sum(-1).max() <= 256
    for grid in (gddim.power_grid(1.0, 1e-3, 20), gddim.log_snr_grid(gddim.CLD(), 1.0, 1e-3, 20)):
        assert not np.isnan(history_nodes(grid, 4)[3:]).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("interpolate", ["data", "residual"])
@pytest.mark.parametrize("corrector", [False, "free"])
def test_times_that_the_clock_does_not_tell_apart_are_passed_over(interpolate, corrector):
    """`σ/α = e^50` and `e^40` are of one angle, and one log-SNR as far as data have scales."""
    sde = gddim.GaussianPath(lambda t: np.exp(-t), lambda t: np.sqrt(-np.expm1(-2 * t)), 50.0)
    sampler = GDDIM(3, interpolate=interpolate, corrector=corrector)
    orders = sampler.coefficients(sde, gddim.power_grid(50.0, 1e-3, 10)).orders
    assert orders[1] < 2 + (not corrector and interpolate == "data")
    assert orders[-1] == 3


def test_much_noise_is_resolved():
    """An integral over a step is that over its two halves, `W = Ψ̂_2 W_1 + W_2` where the polynomial is a constant."""
    ts = np.array([0.6, 0.45, 0.3])
    halves, whole = (GDDIM(1, 20.0, interpolate="residual").coefficients(gddim.VP(), t) for t in (ts, ts[::2]))
    both = halves.psi[1] @ halves.weights[0, 0] + halves.weights[1, 0]
    np.testing.assert_allclose(whole.weights[0, 0], both, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("interpolate", ["eps", "data"])
@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD(), gddim.Blurring(4)], ids=lambda sde: type(sde).__name__)
def test_a_corrector_needs_no_call_at_time_0(sde, lam, interpolate):
    """R_0 is singular for VP and blurring: the last step was NaN, without a word."""
    sampler, grid = GDDIM(2, lam, corrector=True, interpolate=interpolate), [1.0, 0.3, 0.05, 1e-3, 0.0]
    table = sampler.coefficients(sde, grid)
    assert not (table.corrected[-1] and np.linalg.det(sde.noise_factor(0.0)).min() == 0)
    assert error(sampler, sde, grid) < 0.05
    calls = []

    def eps_fn(u, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return jnp.zeros_like(u)

    u = jnp.zeros((*np.shape(sde.transition(1.0, 0.0))[:-2], sde.k, 2))
    jax.block_until_ready(gddim.sample(sampler, sde, eps_fn, u, grid, jax.random.key(0)))
    jax.effects_barrier()
    assert len(calls) == sampler.nfe(4)
    assert min(calls) > 0 or table.corrected[-1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_a_state_in_half_precision_is_that_of_float32_rounded(dtype, steps):
    """CLD multiplies rounding by e^8: in bfloat16 all the way, 5 to 10 steps were off by 0.7 to 2."""
    for sampler in (GDDIM(2), GDDIM(3, interpolate="data"), GDDIM(2, 1.0)):
        single = error(sampler, gddim.CLD(), gddim.power_grid(1.0, 1e-3, steps))
        found = error(sampler, gddim.CLD(), gddim.power_grid(1.0, 1e-3, steps), dtype)
        assert found < 2 * single + float(jnp.finfo(dtype).eps)
