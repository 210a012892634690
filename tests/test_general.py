"""A linear SDE from its coefficients alone: what is exact, what is seen between the nodes, and what has a bound."""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim import CLD, LinearSDE
from gddim.sde.collocation import GAUSS_NODES

A = np.array([[0.0, 4.0], [-1.0, -4.0]])  # CLD's drift over β
START = np.diag([1e-6, 0.01])
BETAS = np.linspace(1e-4, 0.02, 1000)
KNOTS = np.linspace(0, 1, 101)
AT_KNOTS = np.random.default_rng(0).uniform(0.1, 20, 101)


def panels(sde: LinearSDE) -> int:
    return len(sde._solution.polynomials.edges) - 1


def scalar(drift, diffusion_squared, start=0.0, **options) -> LinearSDE:
    """k = 1, the coefficients as functions of t to numbers."""
    return LinearSDE(lambda t: [[drift(t)]], lambda t: [[diffusion_squared(t)]], [[start]], **options)


@pytest.fixture(autouse=True)
def _within_seconds_and_without_a_word():
    """Nothing here takes long, and nothing warns that does not say so."""
    before = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    assert time.process_time() - before < 20


@pytest.mark.parametrize(
    ("drift", "diffusion_squared", "start", "reference"),
    [
        (CLD().drift, CLD().diffusion_squared, START, (lambda t: 4 * A, lambda t: np.diag([0, 8.0]), START)),
        (
            lambda t: 4 * A,
            lambda t: np.diag([0, 8e-9]),
            np.diag([1e-12, 0.01]),
            (lambda t: 4 * A, lambda t: np.diag([1e-30, 8e-9]), np.diag([1e-12, 0.01])),
        ),
    ],
    ids=["rounding in GGᵀ where it is 0", "Σ nearly singular"],
)
def test_a_nearly_singular_covariance_needs_no_more_panels(drift, diffusion_squared, start, reference):
    sde, same = LinearSDE(drift, diffusion_squared, start), LinearSDE(*reference)
    ts = np.array([1e-4, 0.01, 0.3, 1.0])
    R = sde.noise_factor(ts)
    assert np.abs(np.linalg.solve(same.noise_factor(ts), R) - np.eye(2)).max() < 1e-9
    assert panels(sde) < 60


def test_without_noise_r_is_the_transition_of_the_start():
    sde = LinearSDE(lambda t: 4 * A, lambda t: 0 * A, START)
    for t in (1e-3, 0.3, 1.0):
        np.testing.assert_allclose(sde.noise_factor(t), sde.transition(t, 0.0) @ np.sqrt(START), rtol=1e-12, atol=1e-15)
    assert panels(sde) < 60


def test_single_precision_in_a_coefficient_is_told_and_bounded():
    beta = lambda t: jnp.float32(0.1) + jnp.float32(19.9) * jnp.float32(t)
    sde = scalar(lambda t: -beta(t) / 2, lambda t: 0.1 + 19.9 * t)
    with pytest.warns(UserWarning, match=r"drift is known only to .e-0[78] of its size near t = .*single precision"):
        R = sde.noise_factor(0.3)
    assert abs(R / gddim.VP().noise_factor(0.3) - 1).max() < 1e-7
    assert panels(sde) < 1000


def test_noise_in_a_coefficient_has_a_bound_and_a_name():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"drift is not resolved near t = .*breakpoints=; noise"):
        scalar(lambda t: -1 - 0.01 * rng.normal() * float(t) ** 0, lambda t: 1.0).noise_factor(0.3)


def test_a_first_use_while_something_is_traced():
    """Of coefficients in plain Python and in JAX that cannot be traced themselves."""
    drift = lambda t: -jnp.ones((1, 1)) if t < 2 else jnp.zeros((1, 1))
    sde = LinearSDE(drift, lambda t: [[2.0 if t < 2 else 0.0]], [[0.0]])
    R = jax.jit(sde.noise_factor)(jnp.float32(0.5))
    np.testing.assert_allclose(R, [[np.sqrt(-np.expm1(-1))]], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("at", [0.39, 2**-8 - 7e-7], ids=["middle", "edge"])
@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_a_jump(k, at, given):
    """Of F and GGᵀ, in the middle of what was a panel or all but at its end: Ψ and Σ in closed form."""
    rate, one = lambda t: jnp.where(t < at, 1.0, 2.0), np.eye(k)
    jumps = LinearSDE(lambda t: -rate(t) * one, lambda t: 1 / rate(t) * one, one, breakpoints=[at] if given else [])
    np.testing.assert_allclose(jumps.transition(1.0, 0.0), np.exp(at - 2) * one, rtol=1e-12)
    np.testing.assert_allclose(jumps.transition(at / 2, 0.9), np.exp(1.8 - 1.5 * at) * one, rtol=1e-12)
    middle = np.exp(-2 * at) - np.expm1(-2 * at) / 2
    sigma = middle * np.exp(4 * at - 4) - np.expm1(4 * at - 4) / 8
    np.testing.assert_allclose(jumps.covariance(1.0), sigma * one, rtol=1e-12)
    assert panels(jumps) < (20 if given else 120)


@pytest.mark.parametrize("width", [1e-3, 1e-4])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("where", [0.3, 0.71234])
def test_a_pulse_between_the_nodes_is_seen(width, smooth, where):
    bell = lambda t: jnp.exp(-(((t - where) / width) ** 2) / 2) / np.sqrt(2 * np.pi)
    box = lambda t: jnp.where(jnp.abs(t - where) < width / 2, 1.0, 0.0)
    pulse = lambda t: (bell if smooth else box)(t) / width  # of integral 1
    np.testing.assert_allclose(scalar(lambda t: 0.0, lambda t: 1 + pulse(t)).covariance(1.0), [[2.0]], rtol=5e-12)
    np.testing.assert_allclose(
        scalar(lambda t: -pulse(t), lambda t: 1.0).transition(1.0, 0.0), [[np.exp(-1)]], rtol=5e-12
    )


def test_a_pulse_in_one_entry_of_many_is_seen():
    entry = np.zeros((8, 8, 1, 1))
    entry[2, 5] = 1.0
    drift = lambda t: -jnp.ones((8, 8, 1, 1)) - jnp.where(jnp.abs(t - 0.3) < 5e-5, 1e4, 0.0) * entry
    sde = LinearSDE(drift, lambda t: np.ones((1, 1)), np.zeros((1, 1)))
    np.testing.assert_allclose(sde.transition(1.0, 0.0), np.exp(-1 - entry), rtol=5e-12)


def test_positions_of_one_kind_agree_wherever_they_are_looked_at():
    """Three positions; the second is like the first at every node of the whole horizon, the third always."""
    bump = lambda t: jnp.prod(t - (1 + GAUSS_NODES) / 2) * 1e6
    drift = lambda t: -jnp.stack([jnp.ones_like(t), 1 + bump(t), jnp.ones_like(t)])[:, None, None]
    sde = LinearSDE(drift, lambda t: np.ones((1, 1)), np.zeros((1, 1)))
    psi = sde.transition(1.0, 0.5)[:, 0, 0]
    x, w = np.polynomial.legendre.leggauss(20)
    area = sum(w / 4 * np.prod(0.75 + x[:, None] / 4 - (1 + GAUSS_NODES) / 2, -1) * 1e6)
    np.testing.assert_allclose(psi, np.exp([-0.5, -0.5 - area, -0.5]), rtol=1e-11)
    assert len(sde._solution.coefficients.kinds[0]) == 2


def beta_in(language):
    if language == "jax":
        with jax.enable_x64(True):
            steps = jnp.asarray(1000 * BETAS)
        return lambda t: steps[jnp.clip((t * 1000).astype(int), 0, 999)]
    return lambda t: 1000 * BETAS[min(int(t * 1000), 999)]


@pytest.mark.parametrize("language", ["jax", "python"])
def test_a_thousand_betas_as_steps(language):
    beta = beta_in(language)
    sde = scalar(lambda t: -beta(t) / 2, beta, breakpoints=np.arange(1001) / 1000)
    ts = np.arange(1, 1001) / 1000
    found = sde.transition(ts, 0 * ts)[:, 0, 0], sde.noise_factor(ts)[:, 0, 0]
    alphas = np.exp(-np.cumsum(BETAS))
    np.testing.assert_allclose(found, [np.sqrt(alphas), np.sqrt(1 - alphas)], rtol=5e-12)
    assert panels(sde) < 1100
    half = jnp.float32(0.5)
    np.testing.assert_allclose(jax.jit(sde.transition)(half, 0 * half), sde.transition(0.5, 0.0), rtol=1e-5)
    gddim.GDDIM(3).coefficients(sde, gddim.power_grid(1.0, 1e-3, 10))


@pytest.mark.parametrize("breakpoints", [KNOTS, ()], ids=["given", "found"])
def test_an_interpolated_beta_of_a_hundred_knots(breakpoints):
    beta = lambda t: np.interp(t, KNOTS, AT_KNOTS)
    sde = scalar(lambda t: -beta(t) / 2, beta, breakpoints=breakpoints)
    alphas = np.exp(-np.cumsum((AT_KNOTS[1:] + AT_KNOTS[:-1]) / 200))
    found = sde.transition(KNOTS[1:], 0 * KNOTS[1:])[:, 0, 0], sde.noise_factor(KNOTS[1:])[:, 0, 0]
    np.testing.assert_allclose(found, [np.sqrt(alphas), np.sqrt(1 - alphas)], rtol=5e-12)
    assert panels(sde) < (130 if len(breakpoints) else 3000)


def test_more_jumps_than_fit_are_refused_by_time_and_the_way_out():
    beta = beta_in("jax")
    with pytest.raises(ValueError, match=r"not resolved near t = 0\.\d+.*as breakpoints="):
        scalar(lambda t: -beta(t) / 2, beta).noise_factor(0.3)


@pytest.mark.parametrize("breakpoints", [[0.5, np.nan], [-0.1], [1.5]])
def test_breakpoints_outside_the_horizon_are_refused(breakpoints):
    with pytest.raises(ValueError, match="breakpoints"):
        scalar(lambda t: -1.0, lambda t: 1.0, breakpoints=breakpoints)


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e9])
def test_a_decay_of_any_rate_takes_no_panels(rate):
    sde = scalar(lambda t: -rate, lambda t: 2 * rate * (1 + t))
    ts = np.array([1e-3, 1.0, 30.0, 1e6]) / rate
    exact = lambda t: -np.expm1(-2 * rate * t) * (1 - 0.5 / rate) + t  # of Σ' = 2 rate (1 + t − Σ)
    ts = np.append(ts[ts < 1], [0.3, 1.0])
    np.testing.assert_allclose(sde.covariance(ts)[:, 0, 0], exact(ts), rtol=1e-11)
    np.testing.assert_allclose(sde.transition(ts, 0 * ts)[:, 0, 0], np.exp(-rate * ts), rtol=1e-10)
    np.testing.assert_allclose(sde.transition(0.7 + 1 / rate, 0.7), [[np.exp(-1)]], rtol=1e-15 * rate + 1e-12)
    assert sde.transition(0.0, 1.0) > 1e300
    assert panels(sde) < 100


def test_many_coupled_decays_of_a_thousand():
    sde = LinearSDE(lambda t: 1000 * A, lambda t: np.diag([0, 2000.0]), START)
    np.testing.assert_allclose(sde.covariance(1.0), np.diag([1, 0.25]), atol=1e-12)
    ahead = CLD(beta0=1.0).transition(1.0, 0.0)
    np.testing.assert_allclose(sde.transition(0.601, 0.6), ahead, rtol=1e-9)
    np.testing.assert_allclose(sde.transition(0.6, 0.601), np.linalg.inv(ahead), rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LinearSDE(lambda t: -1e6 * np.eye(2), lambda t: np.eye(2), np.eye(2)), r"rate of 1e\+06 .*near t = 0"),
        (lambda: scalar(lambda t: 1e6, lambda t: 1.0), r"drift has a rate of 1e\+06 .*near t = 0"),
        (lambda: scalar(lambda t: 400.0, lambda t: 1.0), r"covariance leaves the range of float64 near t = 0\.8"),
        (lambda: scalar(lambda t: 0.0, lambda t: jnp.where(t < 0.2, 0.0, 1.0)), "diffusion_squared is 0 up to t = 0"),
        (lambda: scalar(lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)), "drift is singular at the horizon, t = 1:"),
        (
            lambda: LinearSDE(lambda t: -np.eye(2) / (1 - t), lambda t: 2 * t / (1 - t) * np.eye(2), np.eye(2)),
            "drift is singular at the horizon, t = 1:",
        ),
        (
            lambda: scalar(lambda t: -jnp.tan(np.pi * t / 2), lambda t: jnp.tan(np.pi * t / 2)),
            "drift is singular at the horizon, t = 1:",
        ),
        (lambda: scalar(lambda t: -1 / t, lambda t: 1.0, 1.0), "drift is singular at the start, t = 0:"),
        (lambda: scalar(lambda t: 0.0, lambda t: 1 / t), "diffusion_squared is singular at the start, t = 0:"),
        (lambda: scalar(lambda t: -1 / jnp.abs(t - 0.6), lambda t: 1.0), r"drift is not .* t = 0\.6"),
        (lambda: scalar(lambda t: -jnp.sqrt(0.7 - t), lambda t: 1.0), r"drift is not finite at t = 0\.7"),
        (lambda: scalar(lambda t: -1.0, lambda t: 1 - 1.5 * jnp.exp(-(((t - 0.6) / 0.01) ** 2))), "not positive semi"),
        (
            lambda: LinearSDE(
                lambda t: 0 * A, lambda t: np.eye(2) + 2 * (t - 0.5) * np.array([[0, 1.2], [1.2, 0]]), np.eye(2)
            ),
            "not positive semidefinite near t = ",
        ),
        (
            lambda: LinearSDE(lambda t: 0 * A, lambda t: np.eye(2) + np.where(t > 0.6, A, 0 * A), START),
            "not symmetric at t = 0",
        ),
    ],
)
def test_what_cannot_be_solved_is_named_within_a_second(make, says):
    with pytest.raises(ValueError, match=says):
        make().noise_factor(0.3)


@pytest.mark.parametrize("power", [3.0, 0.65, 0.5])
def test_noise_that_starts_as_a_power_of_time(power):
    sde, ts = scalar(lambda t: 0.0, lambda t: 2 * power * t ** (2 * power - 1)), np.array([1e-3, 0.01, 0.3, 1.0])
    np.testing.assert_allclose(sde.noise_factor(ts)[:, 0, 0], ts**power, rtol=5e-12)


@pytest.mark.parametrize("gap", [1e-3, 1e-6])
def test_close_to_a_singular_end_rounding_is_named_as_that(gap):
    sde = scalar(lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t), horizon=1 - gap)
    ts = np.array([0.01, 0.5, 1 - gap])
    if gap < 1e-4:
        with pytest.warns(UserWarning, match="near t = 0.99999.*cancellation such as 1 − t near t = 1"):
            sde.noise_factor(0.5)
    np.testing.assert_allclose(sde.noise_factor(ts)[:, 0, 0], ts, rtol=1e-11)
    np.testing.assert_allclose(sde.transition(ts, 0 * ts)[:, 0, 0], 1 - ts, rtol=1e-16 / gap + 5e-12)


@pytest.mark.parametrize("horizon", [1e-12, 1.0, 100.0])
def test_horizons(horizon):
    sde = LinearSDE(lambda t: A * 4 / horizon, lambda t: np.diag([0, 8.0]) / horizon, START, horizon=horizon)
    same, ts = CLD(gamma=0.04 - 4e-6), np.array([1e-4, 0.01, 0.3, 1.0])
    np.testing.assert_allclose(sde.covariance(ts * horizon), same.covariance(ts), rtol=1e-10, atol=1e-16)
    np.testing.assert_allclose(sde.transition(horizon, 0.0), same.transition(1.0, 0.0), rtol=5e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_a_traced_time_outside_the_horizon_is_no_number(k):
    beta = lambda t: np.eye(k) * (1 + t)
    sde = LinearSDE(lambda t: -beta(t) / 2, beta, np.eye(k) / 9, horizon=0.7)
    ts = jnp.asarray([0.0, np.nextafter(np.float32(0.7), 1), 0.71, 70.0, -0.01], jnp.float32)
    both = jax.jit(lambda ts: (sde.noise_factor(ts), sde.transition(0.1 + 0 * ts, ts)))
    for values in both(ts):
        assert jnp.isfinite(values).all((1, 2)).tolist() == [True, True, False, False, False]
    with pytest.raises(ValueError, match="must lie in"):
        sde.noise_factor(0.71)


def test_four_fields_that_do_not_commute_against_an_ode_solver():
    from scipy.integrate import solve_ivp

    rng = np.random.default_rng(3)
    M, B, C = rng.normal(size=(3, 4, 4)), rng.normal(size=(4, 4)), rng.normal(size=(4, 2))
    drift = lambda t: M[0] + M[1] * t + M[2] * t**2 + B * jnp.sin(5 * t)
    diffusion_squared = lambda t: C @ C.T * (1 + t) + np.eye(4) * jnp.exp(-t)
    start = np.eye(4) + 0.1

    def rate(t, flat):
        (psi, R), F = flat.reshape(2, 4, 4), np.asarray(drift(t), float)
        GG = C @ C.T * (1 + t) + np.eye(4) * np.exp(-t)
        return np.stack([F @ psi, F @ R + GG @ np.linalg.inv(R).T / 2]).reshape(-1)

    y = np.stack([np.eye(4), np.linalg.cholesky(start)]).reshape(-1)
    with jax.enable_x64(True):
        psi, R = solve_ivp(rate, (0, 1), y, "DOP853", rtol=1e-13, atol=1e-14).y[:, -1].reshape(2, 4, 4)
    sde = LinearSDE(drift, diffusion_squared, start)
    np.testing.assert_allclose(sde.transition(1.0, 0.0), psi, atol=5e-12 * np.abs(psi).max())
    np.testing.assert_allclose(sde.noise_factor(1.0), R, atol=5e-12 * np.abs(R).max())


def test_kinks_and_paths_of_one_field():
    kink = scalar(lambda t: -abs(t - 0.37), lambda t: 1.0)
    np.testing.assert_allclose(kink.transition(1.0, 0.0), [[np.exp(-(0.37**2 + 0.63**2) / 2)]], rtol=5e-12)
    exploding = scalar(lambda t: 0.0, lambda t: 2 * t, horizon=80.0)
    ts = np.array([0.002, 1.0, 80.0])
    np.testing.assert_allclose(exploding.noise_factor(ts)[:, 0, 0], ts, rtol=5e-12)
    beta, B = lambda t: 0.1 + 19.9 * t, lambda t: 0.1 * t + 9.95 * t**2
    sub = scalar(lambda t: -beta(t) / 2, lambda t: -beta(t) * jnp.expm1(-2 * B(t)))
    ts = np.array([1e-3, 0.1, 1.0])
    np.testing.assert_allclose(sub.noise_factor(ts)[:, 0, 0], -np.expm1(-B(ts)), rtol=5e-12)


def test_colour_images_through_a_process_of_frequencies_with_a_jump():
    """Ψ, R and their derivatives act on states (H, W, k, C), on the device, as on the host."""
    rates = np.arange(1.0, 17.0).reshape(4, 4, 1, 1)
    sde = LinearSDE(lambda t: -rates * jnp.where(t < 0.39, 1, 2), lambda t: 2 * np.ones((1, 1)), 0.1 * np.ones((1, 1)))
    u, eps = jax.random.normal(jax.random.key(0), (2, 4, 4, 1, 3))
    got = jax.jit(lambda t: sde.perturb(u, t, eps))(jnp.float32(0.7))
    psi = np.exp(-rates * (0.39 + 2 * 0.31))
    start = np.exp(-rates * 0.78) * 0.1 - np.expm1(-rates * 0.78) / rates
    sigma = np.exp(-rates * 1.24) * start - np.expm1(-rates * 1.24) / (2 * rates)
    np.testing.assert_allclose(got, psi * u + np.sqrt(sigma) * eps, atol=1e-5)
    np.testing.assert_allclose(sde.drift(0.7), -2 * rates, rtol=1e-10)
    np.testing.assert_allclose(sde.diffusion_squared(0.7) + 0 * rates, 2 + 0 * rates, rtol=1e-8)
