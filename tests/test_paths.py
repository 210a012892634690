"""Paths of one field, and the Langevin chains."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim.check import laws

BETAS = np.linspace(1e-4, 0.02, 1000)
NOISY = gddim.GaussianPath(lambda t: np.exp(-t), lambda t: np.sqrt(0.01 - np.expm1(-2 * t)), horizon=5.0)
PATHS = {
    "VE": gddim.VE(),
    "SubVP": gddim.SubVP(),
    "flow matching": gddim.FlowMatching(),
    "cosine": gddim.VP.cosine(),
    "one beta": gddim.VP.from_betas([0.999]),
    "noise on the data, in NumPy": NOISY,
}


@pytest.mark.parametrize("name", PATHS)
def test_laws(name):
    broken = [law for law in laws(PATHS[name]) if not law.holds]
    assert not broken, broken


@pytest.mark.parametrize("path", [gddim.VP.from_betas(BETAS), gddim.VP.from_betas(BETAS[::100], horizon=1.0)])
def test_laws_of_discrete_times(path):
    """All but the covariance's, whose integral the self-test takes by a rule for smooth coefficients; see the next test."""
    broken = [law for law in laws(path) if not law.holds and "Σ' =" not in law.name]
    assert not broken, broken


def test_discrete_betas_are_exact_at_the_integers_and_log_alpha_is_linear_between():
    for path in (gddim.VP.from_betas(BETAS), gddim.VP.from_betas(BETAS, horizon=1.0)):
        cumulative = np.cumprod(1 - BETAS)
        for i in (1, 2, 500, 1000):
            t = i / 1000 * path.horizon
            np.testing.assert_allclose(path.transition(t, 0.0)[0, 0], np.sqrt(cumulative[i - 1]), rtol=1e-12)
            np.testing.assert_allclose(path.noise_factor(t)[0, 0], np.sqrt(1 - cumulative[i - 1]), rtol=1e-10)
        half = np.log(path.transition(499.5 / 1000 * path.horizon, 0.0)[0, 0])
        np.testing.assert_allclose(half, np.log(cumulative[498:500]).mean() / 2, rtol=1e-10)
        # between them β is constant: GGᵀ = β, F = −β/2
        rate = -np.log1p(-BETAS[499]) * 1000 / path.horizon
        np.testing.assert_allclose(path.diffusion_squared(499.5 / 1000 * path.horizon), [[rate]], rtol=1e-8)
        np.testing.assert_allclose(path.drift(499.5 / 1000 * path.horizon), [[-rate / 2]], rtol=1e-8)
    assert gddim.VP.from_alphas(np.cumprod(1 - BETAS)).horizon == 1000
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        gddim.VP.from_betas([0.1, 1.0])
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        gddim.VP.from_alphas([0.5, 0.9])


def test_closed_forms_are_those_of_the_papers():
    t = np.linspace(0.01, 0.99, 7)
    beta = 0.1 + 19.9 * t
    np.testing.assert_allclose(gddim.SubVP().drift(t)[:, 0, 0], -beta / 2, rtol=1e-10)
    grown = beta * (1 - gddim.VP().transition(t, 0 * t)[:, 0, 0] ** 4)
    np.testing.assert_allclose(gddim.SubVP().diffusion_squared(t)[:, 0, 0], grown, rtol=1e-8)
    np.testing.assert_allclose(gddim.VE().diffusion_squared(t)[:, 0, 0], 2 * t, rtol=1e-12)
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(gddim.VP.cosine().transition(t, 0 * t)[:, 0, 0] ** 2, f, rtol=1e-12)
    np.testing.assert_allclose(gddim.VP.cosine().covariance(t)[:, 0, 0], 1 - f, rtol=1e-10)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax.numpy"])
def test_a_path_from_functions_in_either_library_on_host_and_device(xp):
    path = gddim.GaussianPath(
        lambda t: xp.exp(-0.5 * (0.1 * t + 9.95 * t**2)), lambda t: xp.sqrt(-xp.expm1(-(0.1 * t + 9.95 * t**2)))
    )
    for t in (0.3, np.linspace(0.1, 1, 4)):
        for method in ("noise_factor", "drift", "diffusion_squared"):
            found = getattr(path, method)(t)
            assert isinstance(found, np.ndarray)
            np.testing.assert_allclose(found, getattr(gddim.VP(), method)(t), rtol=1e-8)
    single = jax.jit(jax.vmap(path.noise_factor))(jnp.linspace(0.1, 1, 4))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, gddim.VP().noise_factor(np.linspace(0.1, 1, 4)), rtol=1e-5)


def test_a_flow_at_its_start_where_nothing_is_left_of_the_data():
    for sde in (gddim.FlowMatching(), gddim.GaussianPath(lambda t: 1 - t, lambda t: t)):
        for time in (np.float64, jnp.float32):
            psi = lambda t, s, sde=sde, time=time: sde.transition(time(t), time(s))[0, 0]
            assert (psi(1, 0), psi(1, 0.5), psi(1, 1), psi(0.5, 1)) == (0, 0, 1, np.inf)
            F, half = sde.velocity_factors(time(1))
            assert np.isneginf(F)
            assert np.isposinf(half)
        prior = sde.sample_prior(jax.random.key(0), (2000, 1, 3))
        np.testing.assert_allclose(prior.std(), 1, rtol=0.03)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gddim.VE(0.0), "sigma_max"),
        (lambda: gddim.SubVP(beta_max=-1.0), "SubVP"),
        (lambda: gddim.VP.cosine(horizon=1.5), "horizon"),
        (lambda: gddim.GaussianPath(lambda t: 1 - t, lambda t: t, horizon=2.0), "alpha must"),
        (lambda: gddim.GaussianPath(lambda t: 1.0, lambda t: 2 - t), "sigma/alpha"),
        (lambda: gddim.GaussianPath(lambda t: 1.0, lambda t: 0 * t), "sigma must"),
        (lambda: gddim.PSLD(beta=0.0), "PSLD"),
        (lambda: gddim.PSLD(gamma=0.0), "gamma"),
        (lambda: gddim.CriticallyDamped(epsilon=0.0), "epsilon"),
        (lambda: gddim.GaussianPath(math.exp, lambda t: t), "of math do not"),
        (lambda: gddim.CriticallyDamped(1), "order"),
    ],
)
def test_bad_processes_are_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_a_langevin_chain_is_critically_damped_and_settles_at_white_noise(order):
    sde = gddim.CriticallyDamped(order, beta=1.0)
    F, GG = sde.drift(0.5), sde.diffusion_squared(0.5)
    # (s + w)ⁿ, coefficient by coefficient: a multiple eigenvalue itself is known to the n-th root of the rounding
    np.testing.assert_allclose(np.poly(F), np.poly([-np.sqrt(2 * order - 3)] * order), rtol=1e-7)
    np.testing.assert_allclose(F + F.T + GG, 0, atol=1e-7)
    np.testing.assert_allclose(F[:2, :2][0], [0, 1], atol=1e-10)


def test_the_chain_of_two_is_cld():
    scale, t = np.diag([1.0, 2.0]), np.geomspace(1e-3, 1, 5)
    chain = gddim.CriticallyDamped(2, beta=8.0, epsilon=1e-6)
    cld = gddim.CLD(gamma=0.04 - 4e-6)
    np.testing.assert_allclose(chain.transition(t, 0 * t), scale @ cld.transition(t, 0 * t) / [1.0, 2.0], atol=1e-11)
    np.testing.assert_allclose(chain.covariance(t), scale @ cld.covariance(t) @ scale, rtol=1e-8, atol=1e-12)
