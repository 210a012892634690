"""One denoiser seen through every process, and networks trained elsewhere as denoisers."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim.check import mixture_eps
from gddim.denoiser import SIGMA_MAX, statistic

POINTS = np.random.default_rng(0).uniform(-1, 1, (7, 2, 2, 3))  # seven colour images
PROCESSES = {
    "VP": gddim.VP(),
    "CLD": gddim.CLD(),
    "PSLD": gddim.PSLD(),
    "third order": gddim.CriticallyDamped(3),
    "VE": gddim.VE(),
    "flow matching": gddim.FlowMatching(),
}
PATHS = {
    "VP": gddim.VP(),
    "flow matching": gddim.FlowMatching(),
    "VE": gddim.VE(),
    "cosine": gddim.VP.cosine(),
    "discrete": gddim.VP.from_betas(np.linspace(1e-4, 0.02, 1000)),
}
PREDICTS = ("eps", "data", "v", "score", "velocity")


def denoise(y, sigma):
    """The exact posterior mean of the seven points."""
    points = jnp.asarray(POINTS, y.dtype)
    likelihood = -((y[None] - points) ** 2).sum((1, 2, 3)) / (2 * sigma**2)
    return jnp.tensordot(jax.nn.softmax(likelihood), points, 1)


@pytest.mark.parametrize("name", PROCESSES)
def test_epsilon_through_a_denoiser_is_that_of_the_process(name):
    sde, rng = PROCESSES[name], np.random.default_rng(1)
    exact, seen = map(eqx.filter_jit, (mixture_eps(sde, POINTS, std=0.0), gddim.through(sde, denoise)))
    with jax.enable_x64(True):
        for t in np.geomspace(1e-3, sde.horizon * (1 - 1e-3 * (name == "flow matching")), 10):
            noise = jnp.asarray(rng.normal(size=(2, 2, sde.k, 3)))
            u, t = sde.perturb(sde.lift(jnp.asarray(POINTS[0])), t, noise), jnp.asarray(t)
            expected = exact(u, t)
            assert jnp.abs(seen(u, t) - expected).max() < 1e-10 * jnp.abs(expected).max()


@pytest.mark.parametrize("name", PROCESSES)
def test_the_statistic_is_finite_everywhere_in_float32(name):
    """Also where nothing is left of the data: y is then noise at the largest σ, and a flow starts at t = 1 itself."""
    sde, u = PROCESSES[name], jax.random.normal(jax.random.key(0), (2, 2, PROCESSES[name].k, 3))
    of_state, eps_fn = jax.jit(lambda u, t: statistic(sde, u, t)), eqx.filter_jit(gddim.through(sde, denoise))
    for t in np.geomspace(1e-4, sde.horizon, 7):
        y, sigma = of_state(u, jnp.float32(t))
        assert y.dtype == sigma.dtype == jnp.float32
        assert jnp.isfinite(y).all()
        assert 0 < sigma <= SIGMA_MAX * (1 + 1e-6)
        assert jnp.isfinite(eps_fn(u, jnp.float32(t))).all()


def test_at_the_start_of_a_flow_the_noise_is_kept():
    u = jax.random.normal(jax.random.key(0), (2, 2, 1, 3))
    y, sigma = statistic(gddim.FlowMatching(), u, jnp.float32(1))
    np.testing.assert_allclose(y / sigma, u[..., 0, :], rtol=1e-6)
    near = gddim.through(gddim.FlowMatching(), denoise).denoise(u, jnp.float32(1))
    np.testing.assert_allclose(near, POINTS.mean(0), atol=1e-2)


def test_what_no_denoiser_of_white_noise_can_do_is_refused():
    with pytest.raises(ValueError, match="spectrum of noise"):
        gddim.through(gddim.Blurring(4), denoise)
    with pytest.raises(ValueError, match=r"returned shape \(2, 2, 1\)"):
        gddim.through(gddim.VP(), lambda y, sigma: y[..., :1])(jnp.ones((2, 2, 1, 3)), jnp.float32(0.5))
    with pytest.raises(ValueError, match="predicts='noise' must be"):
        gddim.as_denoiser(denoise, gddim.VP(), predicts="noise")
    with pytest.raises(ValueError, match="CLD must have one field"):
        gddim.as_denoiser(denoise, gddim.CLD(), predicts="eps")


def network(path, predicts):
    """What a perfect network of the path answers, in each of its words."""

    def net(x, t):
        alpha_sigma = lambda t: (path.transition(t, 0.0)[0, 0], path.noise_factor(t)[0, 0])
        (alpha, sigma), slopes = jax.jvp(alpha_sigma, (t,), (jnp.ones_like(t),))
        data = denoise(x / alpha, sigma / alpha)
        noise = (x - alpha * data) / sigma
        return {
            "eps": noise,
            "data": data,
            "v": alpha * noise - sigma * data,
            "score": -noise / sigma,
            "velocity": slopes[0] * data + slopes[1] * noise,
        }[predicts]

    return net


@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("name", PATHS)
def test_a_network_trained_elsewhere_is_the_denoiser_that_it_holds(name, predicts):
    path, y = PATHS[name], jax.random.normal(jax.random.key(2), (2, 2, 3))
    held = jax.jit(gddim.as_denoiser(network(path, predicts), path, predicts))
    with jax.enable_x64(True):
        for sigma in np.geomspace(0.05, 50, 8):
            noisy = jnp.asarray(POINTS[0] + sigma * np.asarray(y, np.float64))
            np.testing.assert_allclose(held(noisy, jnp.asarray(sigma)), denoise(noisy, sigma), atol=1e-9)
    for sigma in np.geomspace(0.05, 50, 8):
        noisy = jnp.asarray(POINTS[0] + sigma * np.asarray(y), jnp.float32)
        np.testing.assert_allclose(held(noisy, jnp.float32(sigma)), denoise(noisy, sigma), atol=1e-3)


@pytest.mark.parametrize("name", PATHS)
def test_the_time_of_a_noise_level(name):
    """Exact to the last digits of float32, and what the network is told is that time, as it counts it."""
    path, told = PATHS[name], []
    held = gddim.as_denoiser(lambda x, label: (told.append(label), x)[1], path, "data", label=lambda t: 10 * t - 1)
    for t in np.geomspace(1e-3, 0.98, 9) * path.horizon:
        sigma = path.noise_factor(t)[0, 0] / path.transition(t, 0.0)[0, 0]
        held(jnp.ones((2, 2, 3)), jnp.float32(sigma))
        np.testing.assert_allclose(told[-1], 10 * t - 1, rtol=3e-6, atol=1e-6 * path.horizon)


BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


@pytest.mark.parametrize("path", [gddim.VP(), gddim.VP.from_betas(BETAS)], ids=["VP", "betas"])
def test_noise_beyond_the_range_of_a_path_is_shown_at_its_end(path):
    told, n = [], jax.random.normal(jax.random.key(0), (2, 2, 3))
    gddim.as_denoiser(lambda x, t: (told.append((x, t)), x)[1], path, "eps")(1e4 * n, jnp.float32(1e4))
    x, t = told[0]
    np.testing.assert_allclose(t, path.horizon, rtol=1e-6)
    np.testing.assert_allclose(x, path.noise_factor(path.horizon)[0, 0] * n, rtol=1e-4)


def test_noise_below_the_range_of_a_path_is_shown_at_its_beginning():
    """As that of score_sde's VE below 0.01: of the same data, with less noise than the network is told."""
    path = gddim.GaussianPath(lambda t: 1 + 0 * t, lambda t: 0.01 * 5000.0**t)
    told, y = [], jax.random.normal(jax.random.key(0), (2, 2, 3))
    for sigma in (0.0, 0.002):
        gddim.as_denoiser(lambda x, t: (told.append((x, t)), x)[1], path, "score")(y, jnp.float32(sigma))
        x, t = told[-1]
        np.testing.assert_allclose(t, 0, atol=1e-6)
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("predicts", PREDICTS)
def test_a_network_through_its_own_path_is_itself(predicts):
    sde = gddim.VP()
    seen = gddim.through(sde, gddim.as_denoiser(network(sde, predicts), sde, predicts))
    eps = network(sde, "eps")
    with jax.enable_x64(True):
        for t in np.linspace(0.05, 1.0, 6):
            u = jax.random.normal(jax.random.key(3), (2, 2, 1, 3), jnp.float64)
            np.testing.assert_allclose(seen(u, jnp.asarray(t))[..., 0, :], eps(u[..., 0, :], jnp.asarray(t)), atol=1e-8)


def test_discrete_networks_are_told_their_discrete_times():
    betas = np.linspace(1e-4, 0.02, 1000)
    cumulative = np.cumprod(1 - betas)
    path, told = gddim.VP.from_betas(betas), []
    held = gddim.as_denoiser(lambda x, i: (told.append((x, i)), x)[1], path, "eps", label=lambda i: i - 1)
    for index in (0, 7, 500, 999):  # as libraries count that begin with 0
        alpha = np.sqrt(cumulative[index])
        held(jnp.ones((2, 2, 3)), jnp.float32(np.sqrt(1 - cumulative[index]) / alpha))
        np.testing.assert_allclose(told[-1][1], index, atol=2e-3)
        np.testing.assert_allclose(told[-1][0], alpha, rtol=1e-5)


def edm(y, sigmas):
    """Karras et al. 2022, Algorithm 1: Heun's method, and Euler's in the last step, to σ = 0."""
    for sigma, following in itertools.pairwise(sigmas):
        slope = (y - denoise(y, sigma)) / sigma
        moved = y + (following - sigma) * slope
        if following > 0:
            moved = y + (following - sigma) / 2 * (slope + (moved - denoise(moved, following)) / following)
        y = moved
    return y


def test_heun_on_the_grid_of_edm_is_the_sampler_of_edm():
    sde, steps = gddim.VE(sigma_max=80.0), 9
    i = np.arange(steps) / (steps - 1)
    sigmas = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    grid = gddim.power_grid(80.0, 0.002, steps - 1, power=7)
    np.testing.assert_allclose(grid, sigmas)
    with jax.enable_x64(True):
        u = 80 * jax.random.normal(jax.random.key(0), (2, 2, 1, 3), jnp.float64)
        eps_fn = gddim.through(sde, denoise)
        found = gddim.sample(gddim.Heun(), sde, eps_fn, u, grid, last="data")
        expected = edm(u[..., 0, :], [*sigmas, 0.0])
        np.testing.assert_allclose(found[..., 0, :], expected, atol=1e-9)


@pytest.mark.parametrize("name", ["CLD", "PSLD", "third order"])
def test_one_network_samples_through_every_process(name):
    """Ten calls of a flow's velocity network end at one of the seven points."""
    sde, flow = PROCESSES[name], gddim.FlowMatching()
    eps_fn = gddim.through(sde, gddim.as_denoiser(network(flow, "velocity"), flow, "velocity"))
    u = jax.vmap(lambda key: sde.sample_prior(key, (2, 2, sde.k, 3)))(jax.random.split(jax.random.key(0), 16))
    sampler, times = gddim.GDDIM(order=2, interpolate="data"), gddim.power_grid(1.0, 1e-3, 20)
    found = jax.vmap(sde.project)(jax.vmap(lambda u: gddim.sample(sampler, sde, eps_fn, u, times))(u))
    distance = np.abs(np.asarray(found)[:, None] - POINTS).max((2, 3, 4)).min(1)
    assert np.median(distance) < 0.05
