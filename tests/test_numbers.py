"""Numbers that a plausible slip would change, against formulas written here: baselines, the final call, options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_residual import gaussian_eps, gaussian_flow

import gddim
from gddim.guidance import Measured
from gddim.samplers.base import denoising_call
from gddim.samplers.grids import two_phase_grid
from gddim.train import adam

STD = 0.5


def spread(sde, t):
    """The covariance of the state at t of data N(0, STD²)."""
    psi = sde.transition(t, 0 * t)[..., :1]
    return sde.covariance(t) + STD**2 * psi @ np.swapaxes(psi, -1, -2)


def carried(sampler, sde, steps):
    """That of samples by a table of one call a step, of the exact ε, relative to the exact one."""
    ts = gddim.power_grid(1.0, 1e-2, steps)
    table, C = sampler.coefficients(sde, ts), spread(sde, ts[0])
    if table.start is not None:
        psi, noise = table.start
        C = psi @ C @ psi.T + noise @ noise.T
    eps = np.swapaxes(sde.noise_factor(table.times), -1, -2) @ np.linalg.inv(spread(sde, table.times))
    n = len(table.times)
    through = table.psi + table.weights[:, 0] @ (table.record_u[:n] + table.record_eps[:n] @ eps)
    for M, noise in zip(through, table.noise, strict=True):
        C = M @ C @ M.T + noise @ noise.T
    exact = spread(sde, ts[-1])
    return np.linalg.norm(C - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD()], ids=["vp", "cld"])
@pytest.mark.parametrize("sampler", [gddim.EulerMaruyama(1.0), gddim.EulerMaruyama(0.0), gddim.SSCS()], ids=repr)
def test_baselines_of_first_order_end_in_the_marginal(sde, sampler):
    """λ > 0 has no one path to compare with: the covariance of Gaussian data is carried through the table."""
    coarse, fine = (carried(sampler, sde, steps) for steps in (400, 800))
    assert fine < 0.15
    assert 1.6 < coarse / fine < 2.4


def test_heun_is_of_second_order_where_the_drift_acts():
    sde, u = gddim.CLD(), np.array([[0.3], [-0.8]])
    exact = gaussian_flow(sde, STD, 1.0, 1e-2) @ u
    with jax.enable_x64(True):
        eps, start = gaussian_eps(sde, STD), jnp.asarray(u)
        far = [
            np.linalg.norm(gddim.sample(gddim.Heun(), sde, eps, start, gddim.power_grid(1.0, 1e-2, steps)) - exact)
            for steps in (100, 200)
        ]
    assert 3.4 < far[0] / far[1] < 4.6


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD()], ids=["vp", "cld"])
def test_the_last_euler_step_is_one_of_the_reverse_sde_without_noise(sde):
    """`u − t (F u − GGᵀ score)`, the score being −R⁻ᵀε; that of the flow has half of it."""
    t = np.asarray(0.02)
    of_u, of_eps = denoising_call(sde, t, "euler")
    F, GG, R = sde.drift(t), sde.diffusion_squared(t), sde.noise_factor(t)
    np.testing.assert_allclose(of_u, np.eye(sde.k) - t * F, rtol=1e-10)
    np.testing.assert_allclose(of_eps, -t * GG @ np.linalg.inv(R).T, rtol=1e-8, atol=1e-12)


def test_the_score_of_gaussian_noise_is_minus_its_precision_times_the_state():
    sde, t, u = gddim.CLD(), 0.3, np.array([[0.3, -1.0], [2.0, 0.5]])
    R, precision = sde.noise_factor(t), np.linalg.inv(sde.covariance(t))
    with jax.enable_x64(True):
        np.testing.assert_allclose(sde.score(jnp.asarray(R.T @ precision @ u), t), -precision @ u, rtol=1e-9)


def test_betas_and_cumulative_products_are_one_schedule():
    betas = np.linspace(1e-4, 0.02, 50)
    ours, theirs = gddim.VP.from_alphas(np.cumprod(1 - betas)), gddim.VP.from_betas(betas)
    np.testing.assert_allclose(ours.log_alphas, theirs.log_alphas, rtol=1e-10)
    np.testing.assert_allclose(ours.transition(50.0, 0.0)[0, 0] ** 2, np.prod(1 - betas), rtol=1e-10)


def test_psld_settles_at_the_mass():
    sde, mass = gddim.PSLD(beta=6.0, m_inv=3.0, gamma_x=0.2, gamma_v=1.7), 1 / 3
    F, GG, S = sde.drift(0.4), sde.diffusion_squared(0.4), np.diag([1.0, mass])
    np.testing.assert_allclose(F, 3 * np.array([[-0.2, 3.0], [-1.0, -1.7]]), rtol=1e-8)
    np.testing.assert_allclose(GG, 6 * np.diag([0.2, mass * 1.7]), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(F @ S + S @ F.T + GG, 0, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.04])
def test_derivatives_of_cld_are_finite_where_its_beta_begins_at_0(gamma):
    sde = gddim.CLD(beta0=0.0, beta1=8.0, gamma=gamma)
    for t in (0.0, 1e-20, 1e-12, 1e-6):
        found, exact = sde.velocity_factors(jnp.float32(t)), sde.velocity_factors(np.float64(t))
        for single, double in zip(found, exact, strict=True):
            np.testing.assert_allclose(single, double, rtol=1e-5, atol=1e-6 * np.abs(double).max())


@pytest.mark.parametrize(("clip", "cut"), [(0.1, 0.02), (50.0, 1.0)])
def test_gradients_are_cut_to_the_norm_that_is_asked_and_forgotten_at_the_rate(clip, cut):
    optimizer, g = adam(beta1=0.6, clip=clip), jnp.array([3.0, 4.0])
    _, state = optimizer.update(g, optimizer.init(jnp.zeros(2)))
    moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,))
    np.testing.assert_allclose(moment, 0.4 * cut * g, rtol=1e-5)


def test_two_phases_are_uniform_and_then_of_the_power():
    ts = two_phase_grid(1.0, 1e-3, 10, share=0.4, fraction=0.5, power=3.0)
    np.testing.assert_allclose(ts[:5], np.linspace(1.0, 0.5, 5))
    np.testing.assert_allclose(ts[4:], np.linspace(0.5 ** (1 / 3), 1e-3 ** (1 / 3), 7) ** 3)


def test_a_measurement_of_a_denoiser_that_is_not_positive_changes_nothing():
    """Conjugate gradients would diverge along its directions: −1 is the slope of this one."""
    denoise = lambda y, sigma, cond=None: -y
    y = jnp.linspace(-1, 1, 12).reshape(2, 2, 3)
    measured = Measured(denoise, lambda x: x[:1], jnp.ones((1, 2, 3)), 0.01)
    np.testing.assert_array_equal(measured(y, 0.7), -y)
