"""Laws of the processes, in float64 and on the device."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from experiments.processes import blurred_langevin
from gddim.check import laws, main
from gddim.sde.blurring import dct2, idct2
from gddim.sde.linalg import inverse, lq, symmetric_root

PROCESSES = {
    "VP": gddim.VP(),
    "CLD": gddim.CLD(),
    "CLD, time-dependent": gddim.CLD(m_inv=9.0, beta0=0.0, beta1=8.0, gamma=0.5, epsilon=1e-4),
    "Blurring": gddim.Blurring(4),
    "PSLD": gddim.PSLD(),
    "third order": gddim.CriticallyDamped(3),
    "blurred CLD": blurred_langevin(4),
}


class CholeskyCLD(gddim.AbstractLinearSDE):
    """CLD with L in the place of R: what the laws must not accept. Written in jax.numpy for scalar times alone."""

    k: int = 2
    horizon: float = 1.0

    def transition(self, t, s):
        return jnp.asarray(gddim.CLD().transition(jnp.asarray(t), jnp.asarray(s)))

    def noise_factor(self, t):
        return gddim.CLD().cholesky_factor(jnp.asarray(t))

    def to_pixels(self, u):
        return u

    def from_pixels(self, x):
        return x


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("third order", "CLD, time-dependent"))) for n in PROCESSES],
)
def test_laws(name):
    broken = [law for law in laws(PROCESSES[name]) if not law.holds]
    assert not broken, broken


def test_the_cholesky_factor_breaks_the_law_of_r():
    """Any factor of Σ passes the other laws: this one tells R, and it needs only the first two laws to be measured."""
    semigroup, equation = itertools.islice(laws(CholeskyCLD()), 2)
    assert semigroup.holds
    assert not equation.holds


def test_check_command_fails_for_a_broken_process_and_names_a_wrong_one(capsys):
    assert main(["gddim"]) == 2
    assert main(["gddim:nothing"]) == 2
    assert "module:object" in capsys.readouterr().err


def too_late():
    return gddim.Blurring(4, horizon=2.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gddim:LinearSDE"], "gddim:LinearSDE cannot be called without arguments"),
        (["gddim:VP", "--t-min", "0"], "t_min=0.0 must lie in"),
        (["gddim:VP", "--t-min", "1"], "t_min=1.0 must lie in"),
        (["test_sde:too_late"], "horizon=2.0"),
    ],
)
def test_check_command_says_in_one_line_what_it_cannot_measure(arguments, says, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_cld_agrees_with_its_own_coefficients_solved_numerically():
    A = np.array([[0.0, 4.0], [-1.0, -4.0]])
    general = gddim.LinearSDE(lambda t: 4 * A, lambda t: np.diag([0.0, 8.0]), np.diag([1e-6, 0.01 + 1e-6]))
    ts = np.geomspace(1e-5, 1, 60)
    for method in ("noise_factor", "covariance", "drift", "diffusion_squared"):
        np.testing.assert_allclose(
            getattr(general, method)(ts), getattr(gddim.CLD(), method)(ts), rtol=1e-8, atol=1e-11
        )


@pytest.mark.parametrize("gamma", [0.0, 1e-4, 1e-3])
def test_cld_whose_velocity_starts_nearly_at_rest(gamma):
    cld, ts = gddim.CLD(gamma=gamma), np.array([1e-5, 1e-3, 3e-3, 1e-2, 0.1, 1.0])
    start = np.diag([cld.epsilon, gamma / 4 + cld.epsilon])
    F, GG = cld.drift(0.5), cld.diffusion_squared(0.5)
    R = gddim.LinearSDE(lambda t: F, lambda t: GG, start).noise_factor(ts)
    assert np.abs(np.linalg.solve(R, cld.noise_factor(ts)) - np.eye(2)).max() < 1e-11


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD(), gddim.Blurring(4)], ids=repr)
def test_derivatives_map_over_arrays_of_times(sde, count):
    ts = np.linspace(0.2, 0.8, count)
    for method in (sde.drift, sde.diffusion_squared):
        exact = method(ts)
        np.testing.assert_allclose(method(jnp.asarray(ts)), exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("count", [3, 4])
def test_the_prior_covariance_maps_over_arrays_of_times(count):
    sde, ts = gddim.Blurring(4), np.linspace(0.2, 0.8, count)
    np.testing.assert_array_equal(sde.prior_covariance(ts), np.stack([sde.prior_covariance(t) for t in ts]))


def test_derivatives_at_the_ends():
    with jax.enable_x64(True):
        rate = jax.jacfwd(gddim.CLD().noise_factor)
        np.testing.assert_allclose(rate(jnp.asarray(0.0)), rate(jnp.asarray(1e-13)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gddim.VP().diffusion_squared(0.0), [[0.1]])
    np.testing.assert_allclose(gddim.CLD().drift(jnp.asarray(1)), gddim.CLD().drift(1.0), rtol=1e-6)


def test_angle_of_r_against_its_equation():
    """`R' = F̂ R` integrated by scipy from the closed form at a small t, with tolerances far below the claim."""
    from scipy.integrate import solve_ivp

    sde = gddim.CLD(beta0=2.0, beta1=3.0, gamma=0.3, epsilon=1e-3)
    G = 2 / np.sqrt(sde.m_inv)

    def rhs(t, r):
        b = sde.beta0 + sde.beta1 * t
        F, GG = b * np.array([[0, sde.m_inv], [-1, -G * sde.m_inv]]), np.diag([0, 2 * G * b])
        R = r.reshape(2, 2)
        return ((F + 0.5 * GG @ np.linalg.inv(R @ R.T)) @ R).reshape(-1)

    found = solve_ivp(rhs, (0, 1), sde.noise_factor(0.0).reshape(-1), "DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    np.testing.assert_allclose(found.reshape(2, 2), sde.noise_factor(1.0), atol=1e-9)


def test_user_functions_in_plain_python_and_singular_k1_start():
    import math

    plain = gddim.LinearSDE(
        lambda t: [[-0.5 * (0.1 + 19.9 * t)]], lambda t: [[0.1 + 19.9 * t + 0 * math.exp(t)]], [[0.0]]
    )
    ts = np.geomspace(1e-5, 1, 30)
    np.testing.assert_allclose(plain.noise_factor(ts), gddim.VP().noise_factor(ts), rtol=1e-11)


@pytest.mark.parametrize("name", PROCESSES)
def test_methods_under_jit_vmap_and_grad(name):
    sde = PROCESSES[name]
    t = jnp.linspace(0.1, 0.9, 3, dtype=jnp.float32)
    R = jax.jit(jax.vmap(lambda t: jnp.asarray(sde.noise_factor(t))))(t)
    np.testing.assert_allclose(R, sde.noise_factor(np.asarray(t, np.float64)), rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda t: jnp.sum(jnp.asarray(sde.transition(t, 0.05))))(t[1])
    h = 1e-6
    expected = (np.sum(sde.transition(0.5 + h, 0.05)) - np.sum(sde.transition(0.5 - h, 0.05))) / (2 * h)
    np.testing.assert_allclose(slope, expected, rtol=1e-3)
    assert jax.tree.leaves(sde) == []


@pytest.mark.parametrize("name", ["VP", "CLD", "Blurring", "blurred CLD"])
def test_lift_project_and_prior(name):
    sde = PROCESSES[name]
    dims = np.shape(sde.transition(1.0, 0.0))[:-2]
    x0 = jax.random.normal(jax.random.key(0), (*dims, 3))
    np.testing.assert_allclose(sde.project(sde.lift(x0)), x0, atol=1e-5)
    prior = jax.vmap(lambda key: sde.sample_prior(key, (*dims, sde.k, 3)))(jax.random.split(jax.random.key(1), 4000))
    spread = prior.std(0).mean((*range(len(dims)), -1))
    np.testing.assert_allclose(spread, [1.0, 0.5][: sde.k], rtol=0.03)


def test_cosine_transform_is_orthonormal_and_matches_scipy():
    from scipy.fft import dctn

    x = np.random.default_rng(0).normal(size=(6, 5, 2)).astype(np.float32)
    np.testing.assert_allclose(dct2(x), dctn(x, axes=(0, 1), norm="ortho"), atol=1e-5)
    np.testing.assert_allclose(idct2(dct2(x)), x, atol=1e-5)


def test_blurring_starts_where_noise_to_signal_is_80():
    sde = gddim.Blurring(4)
    alpha_0, alpha = (1 - sde.noise_factor(t)[0, 0] ** 2 for t in (0.0, sde.start_time()))
    assert np.sqrt((1 - alpha) / alpha * alpha_0) - np.sqrt(1 - alpha_0) == pytest.approx(80, rel=0.02)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_small_matrix_algebra(k):
    A = np.random.default_rng(k).normal(size=(7, k, k))
    np.testing.assert_allclose(inverse(A), np.linalg.inv(A), rtol=1e-8, atol=1e-10)
    L, O = lq(A)
    np.testing.assert_allclose(L @ O, A, atol=1e-12)
    np.testing.assert_allclose(L @ L.swapaxes(-1, -2), A @ A.swapaxes(-1, -2), atol=1e-12)
    S = A @ A.swapaxes(-1, -2)
    np.testing.assert_allclose(symmetric_root(S) @ symmetric_root(S), S, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gddim.CLD(m_inv=0.0), "m_inv"),
        (lambda: gddim.CLD(m_inv=np.inf), "m_inv"),
        (lambda: gddim.CLD(beta0=-1.0), "beta0"),
        (lambda: gddim.CLD(epsilon=0.0), "epsilon"),
        (lambda: gddim.VP(beta_max=-1.0), "beta_max"),
        (lambda: gddim.Blurring(size=0), "size"),
        (lambda: gddim.Blurring(d_min=0.0), "d_min"),
        (lambda: gddim.LinearSDE(lambda t: np.eye(2), lambda t: np.eye(2), -np.eye(2)), "initial_covariance"),
        (lambda: gddim.LinearSDE(lambda t: np.eye(2), lambda t: -np.eye(2), np.eye(2)), "diffusion_squared"),
        (lambda: gddim.LinearSDE(lambda t: np.nan * np.eye(2), lambda t: np.eye(2), np.eye(2)), "drift"),
        (lambda: gddim.LinearSDE(lambda t: np.ones((2, 3)), lambda t: np.eye(2), np.eye(2)), "drift"),
        (lambda: gddim.LinearSDE(lambda t: np.eye(2), lambda t: np.eye(3), np.eye(2)), "diffusion_squared"),
        (lambda: gddim.LinearSDE(lambda t: np.eye(1), lambda t: np.eye(1), np.eye(1), horizon=0.0), "horizon"),
        (lambda: gddim.LinearSDE(lambda t: np.eye(1), lambda t: np.eye(1), lambda t: np.eye(1)), "must be a matrix"),
    ],
)
def test_bad_processes_are_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("number", [int, np.float32, np.array, jnp.float32])
def test_parameters_are_numbers_of_any_library(number):
    for sde, same in (
        (gddim.CLD(m_inv=number(4), beta0=number(2)), gddim.CLD(beta0=2.0)),
        (gddim.VP(beta_max=number(20)), gddim.VP()),
        (gddim.Blurring(np.int64(8), sigma_max=number(10)), gddim.Blurring(8)),
        (gddim.VE(number(80)), gddim.VE()),
        (gddim.VP.cosine(horizon=number(1)), gddim.VP.cosine(horizon=1.0)),
        (gddim.PSLD(number(8), m_inv=number(4)), gddim.PSLD()),
        (gddim.CriticallyDamped(np.int64(3), horizon=number(1)), gddim.CriticallyDamped()),
    ):
        assert sde == same
        assert hash(sde) == hash(same)


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD(), gddim.Blurring(4)], ids=repr)
def test_coefficients_at_float32_times_are_float32_under_x64(sde):
    with jax.enable_x64(True):
        t = jnp.float32(0.5)
        assert sde.noise_factor(t).dtype == sde.transition(t, 0.0).dtype == jnp.float32


@pytest.mark.parametrize(("model", "width"), [(gddim.Denoiser, 3), (gddim.EpsModel, 6)])
def test_a_network_of_another_width_is_refused(model, width):
    sde, u = gddim.CLD(), jnp.ones((4, 4, 2, 3))
    of_width = lambda n: model(sde, lambda x, level, cond=None, *, key=None: x[..., :1].repeat(n, -1))
    assert of_width(width)(u, 0.5).shape == u.shape
    for other in (1, 2):
        with pytest.raises(ValueError, match=rf"\(4, 4, {other}\).*\(4, 4, {width}\)"):
            of_width(other)(u, 0.5)


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("array", [np.ones, jnp.ones], ids=["numpy", "jax"])
def test_loss_takes_numpy_data_and_keys_of_both_kinds(key, array):
    model = gddim.Denoiser(gddim.CLD(), lambda x, level, cond=None, *, key=None: jnp.zeros_like(x))
    expected = gddim.denoising_loss(model, jnp.ones((5, 4, 4, 3)), jax.random.key(0))
    np.testing.assert_allclose(gddim.denoising_loss(model, array((5, 4, 4, 3), np.float32), key(0)), expected)


def test_a_factor_of_nothing_is_nothing():
    """At t = 0 a state is the data."""
    for sde in (gddim.VP(), gddim.Blurring(4)):
        np.testing.assert_array_equal(sde.cholesky_factor(0.0), sde.noise_factor(0.0))


@pytest.mark.parametrize("t", [-0.1, 1.2, np.array([0.5, 1.1])])
def test_a_solved_process_has_an_end(t):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1.0\]"):
        gddim.PSLD().noise_factor(t)


class OneTime(gddim.VP):
    """In NumPy, of one time only."""

    def transition(self, t, s):
        return np.asarray(super().transition(t, s)) * np.ones((1, 1, 1))

    def noise_factor(self, t):
        return np.sqrt(-np.expm1(-t)) * np.ones((1, 1))


def test_a_process_of_one_time_at_once_is_named():
    with pytest.raises(ValueError, match=r"OneTime\.noise_factor of times of shape"):
        gddim.GDDIM(2).coefficients(OneTime(), gddim.power_grid(1.0, 1e-3, 5))


def test_wrong_state_shape():
    with pytest.raises(ValueError, match="u0 has shape"):
        gddim.CLD().perturb(jnp.zeros((4, 1, 3)), 0.5, jnp.zeros((4, 1, 3)))
    with pytest.raises(ValueError, match="Blurring takes"):
        gddim.Blurring(4).check_state(jnp.zeros((5, 5, 1, 3)))
    with pytest.raises(ValueError, match=r"state of x0 has shape \(5, 5, 1, 3\)"):
        gddim.Blurring(4).lift(jnp.zeros((5, 5, 3)))
    with pytest.raises(ValueError, match=r"u has shape \(7, 4, 4, 1, 3\)"):
        gddim.Blurring(4).project(jnp.zeros((7, 4, 4, 1, 3)))  # a batch: its first axis is no frequency


def test_a_batch_of_times_is_mapped_over_and_not_taken_for_dims():
    states, ts = jnp.zeros((4, 4, 4, 1, 3)), jnp.full(4, 0.5)
    for method in (lambda: gddim.VP().perturb(states, ts, states), lambda: gddim.VP().score(states, ts)):
        with pytest.raises(ValueError, match=r"t has shape \(4,\), accepted is one time"):
            method()


def test_float32_noise_factor_is_within_five_millionths():
    ts = np.geomspace(1e-5, 1, 400).astype(np.float32)
    for sde in (gddim.VP(), gddim.CLD(), gddim.CLD(m_inv=9.0, beta0=0.0, beta1=10.0), gddim.Blurring(4)):
        single = np.asarray(eqx.filter_jit(jax.vmap(sde.noise_factor))(ts), np.float64)
        double = sde.noise_factor(ts.astype(np.float64))
        gap = np.linalg.norm(single - double, axis=(-2, -1)) / np.linalg.norm(double, axis=(-2, -1))
        assert gap.max() < 5e-6
