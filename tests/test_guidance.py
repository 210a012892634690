"""Laws of guidance and of inverse problems, on data whose exact denoisers are known, through several processes."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim.denoiser import Through
from gddim.guidance import Autoguidance, Classifier, ClassifierFree, Measured, guided, noise_covariance
from gddim.sde.linalg import Array

CENTRES = jnp.array([[-1.0, 0.4], [0.6, -0.2], [0.9, 0.8]])  # of three classes of points
STD = 0.25
SHARE = jnp.array([0.5, 0.3, 0.2])


def log_parts(y: Array, sigma: Array) -> Array:
    """`log p(c) p(y | c)` of each class, but for a constant of σ."""
    return jnp.log(SHARE) - ((y[None] - CENTRES) ** 2).sum(-1) / (2 * (STD**2 + sigma**2))


def log_class(y: Array, sigma: Array, cond: dict[str, Array]) -> Array:
    return jax.nn.log_softmax(log_parts(y, sigma))[cond["label"]]


def denoise(y: Array, sigma: Array, cond: dict[str, Array] | None = None) -> Array:
    """The exact one, of a class or of all."""
    each = y[None] + sigma**2 * (CENTRES - y[None]) / (STD**2 + sigma**2)
    of_all = jax.nn.softmax(log_parts(y, sigma)) @ each
    if cond is None:
        return of_all
    label = cond["label"]
    return jnp.where(label < 0, of_all, each[jnp.maximum(label, 0)])


CLASS = {"label": jnp.array(1)}
Y = jax.random.normal(jax.random.key(0), (20, 2))
SIGMAS = jnp.geomspace(0.05, 5.0, 20)


def along(changed) -> Array:
    return jax.vmap(lambda y, sigma: changed(y, sigma, CLASS))(Y, SIGMAS)


def test_scale_1_is_the_conditional_denoiser_bit_for_bit_and_0_the_unconditional():
    of_class, of_all = along(denoise), along(lambda y, sigma, cond: denoise(y, sigma))
    np.testing.assert_array_equal(along(ClassifierFree(denoise, 1.0)), of_class)
    np.testing.assert_array_equal(along(ClassifierFree(denoise, 0.0)), of_all)
    np.testing.assert_array_equal(along(Classifier(denoise, log_class, 0.0)), of_class)
    assert jnp.abs(of_class - of_all).max() > 0.1


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 5.0])
def test_the_score_is_that_of_the_tilted_density_at_every_noise_level(scale):
    """`∇ log [p(y) p(c | y)^w] = (D − y)/σ²`, by classifier-free guidance and by the classifier itself."""

    def tilted(y, sigma, cond):
        log_density = lambda y: jax.nn.logsumexp(log_parts(y, sigma)) + scale * log_class(y, sigma, cond)
        return y + sigma**2 * jax.grad(log_density)(y)

    exact = along(tilted)
    np.testing.assert_allclose(along(ClassifierFree(denoise, scale)), exact, atol=2e-5)
    unconditional = lambda y, sigma, cond: denoise(y, sigma)
    np.testing.assert_allclose(along(Classifier(unconditional, log_class, scale)), exact, atol=2e-5)


def test_a_pair_is_one_call_of_the_network_and_outside_the_interval_half_of_it():
    calls = []

    def counted(y, sigma, cond):
        calls.append(None)
        return denoise(y, sigma, cond)

    ClassifierFree(counted, 2.0)(Y[0], 1.0, CLASS)
    assert len(calls) == 1
    within = ClassifierFree(denoise, 2.0, interval=(0.1, 1.0))
    for sigma, scale in ((0.1, 1.0), (0.11, 2.0), (1.0, 2.0), (1.01, 1.0)):
        expected = ClassifierFree(denoise, scale)(Y[0], sigma, CLASS)
        np.testing.assert_allclose(within(Y[0], sigma, CLASS), expected, atol=1e-6)
    costs = str(jax.make_jaxpr(within)(Y[0], 0.5, CLASS))
    assert "cond[" in costs, "a branch is taken, and the other is not computed"


def test_a_model_guided_by_itself_is_itself_and_by_a_worse_one_moves_away_from_it():
    np.testing.assert_array_equal(along(Autoguidance(denoise, denoise, 3.0)), along(denoise))
    worse = lambda y, sigma, cond: 0.9 * denoise(y, sigma, cond)
    np.testing.assert_allclose(along(Autoguidance(denoise, worse, 3.0)), 1.2 * along(denoise), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD()], ids=["VP", "CLD"])
def test_samples_of_a_class_have_its_mean_and_covariance_and_guidance_sharpens_them(sde):
    def drawn(scale):
        eps_fn = gddim.through(sde, eqx.Partial(ClassifierFree(denoise, scale), cond=CLASS))
        solver = gddim.Method(gddim.GDDIM(2, interpolate="data"), 20).solver(sde)
        states = jax.vmap(lambda key: sde.sample_prior(key, (sde.k, 2)))(jax.random.split(jax.random.key(0), 2000))
        return jax.vmap(lambda u: sde.project(solver(eps_fn, u).state))(states)

    x = drawn(1.0)
    np.testing.assert_allclose(x.mean(0), CENTRES[1], atol=4 * STD / 2000**0.5)
    np.testing.assert_allclose(jnp.cov(x.T), STD**2 * np.eye(2), atol=6 * STD**2 / 2000**0.5)
    certain = [float(jax.vmap(lambda x: log_class(x, jnp.array(0.0), CLASS))(drawn(w)).mean()) for w in (0, 1, 2, 4)]
    assert np.all(np.diff(certain) > 0), certain


SHAPE = (4, 4, 3)  # colour images, of correlated pixels


@pytest.fixture(scope="module")
def gaussian() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(48, 48)) / 48**0.5
    return rng.normal(size=48) / 2, 0.3 * factor @ factor.T + 0.02 * np.eye(48)


def of_gaussian(mean: np.ndarray, covariance: np.ndarray, basis: gddim.AbstractLinearSDE | None):
    """The exact denoiser of `N(mean, covariance)`, also of noise with a spectrum."""
    variances, axes = map(jnp.asarray, np.linalg.eigh(covariance))

    def white(y, sigma, cond=None):
        found = axes @ (variances / (variances + sigma**2) * (axes.T @ (y.ravel() - mean)))
        return (mean + found).reshape(SHAPE)

    def exact(y, sigma, cond=None):
        noise = jax.vmap(lambda v: noise_covariance(v.reshape(SHAPE), sigma, basis).ravel())(jnp.eye(48))
        gain = jnp.linalg.solve(covariance + noise, covariance).T
        return (mean + gain @ (y.ravel() - mean)).reshape(SHAPE)

    return exact if basis else white


def two_halves(x: Array) -> Array:
    return jax.lax.complex(half(x), half(x))


def half(x: Array) -> Array:
    """The upper half, a little blurred across: a measurement that is no projection."""
    return x[:2] + 0.5 * jnp.roll(x, 1, 1)[:2]


NOISE = 0.1


def posterior(mean, covariance):
    """Mean and covariance of the data, given what `half` measured of some, with noise."""
    A = np.asarray(jax.jacobian(lambda x: half(x.reshape(SHAPE)).ravel())(jnp.zeros(48)))
    b = half(jnp.asarray(np.random.default_rng(1).multivariate_normal(mean, covariance).reshape(SHAPE), jnp.float32))
    gain = covariance @ A.T @ np.linalg.inv(A @ covariance @ A.T + NOISE**2 * np.eye(len(A)))
    return b, mean + gain @ (np.asarray(b).ravel() - A @ mean), covariance - gain @ A @ covariance


PROCESSES = {"VP": gddim.VP(), "CLD": gddim.CLD(), "Blurring": gddim.Blurring(4)}


def draw(sde, denoiser, count: int) -> np.ndarray:
    solver = gddim.Method(gddim.GDDIM(2, interpolate="data"), 20).solver(sde)

    @eqx.filter_jit
    def one(key):
        return sde.project(solver(Through(sde, denoiser), sde.sample_prior(key, (4, 4, sde.k, 3))).state)

    return np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(2), count)), np.float64).reshape(count, 48)


@pytest.mark.parametrize("name", PROCESSES)
def test_of_gaussian_data_the_posterior_is_exact_through_every_process(name, gaussian):
    sde = PROCESSES[name]
    basis = sde if name == "Blurring" else None
    b, mean, covariance = posterior(*gaussian)
    changed = Measured(of_gaussian(*gaussian, basis), half, b, NOISE, iterations=40, basis=basis)
    n = 1000
    x = draw(sde, changed, n)
    spread = np.sqrt(np.diag(covariance))
    assert np.abs((x.mean(0) - mean) / spread).max() < 4.5 / n**0.5 + 0.03
    assert np.abs(np.cov(x.T) - covariance).max() < 5 * covariance.max() / n**0.5 + 0.02 * covariance.max()
    near = Measured(of_gaussian(*gaussian, basis), half, b, NOISE, by="pseudoinverse", iterations=40, basis=basis)
    off = np.linalg.norm(draw(sde, near, n).mean(0) - mean)
    assert off < 0.1 * np.linalg.norm(mean), "within 10 %, of data that are not white"
    replaced = Measured(of_gaussian(*gaussian, basis), half, b, NOISE, by="replacement", basis=basis)
    bias = np.abs((draw(sde, replaced, n).mean(0) - mean) / spread).max()
    assert bias > 0.3, "replacement is biased, and this test would see it"


def test_the_pseudoinverse_is_exact_for_white_data_and_near_for_others(gaussian):
    y, sigma = jax.random.normal(jax.random.key(3), SHAPE), 0.7
    for covariance, near in ((0.25 * np.eye(48), 1e-4), (gaussian[1], 0.5)):
        b, _, _ = posterior(gaussian[0], covariance)
        D = of_gaussian(gaussian[0], covariance, None)
        exact = Measured(D, half, b, NOISE, iterations=40)(y, sigma)
        found = Measured(D, half, b, NOISE, by="pseudoinverse", data_std=0.5, iterations=40)(y, sigma)
        assert jnp.linalg.norm(found - exact) < near * jnp.linalg.norm(exact - D(y, sigma))


def test_a_trained_model_is_guided_through_its_process():
    net = lambda x, level, cond=None, *, key=None: jnp.tanh(x) + jax.nn.one_hot(cond["label"], 3)[None, None]
    model = gddim.Denoiser(gddim.CLD(), net, data_std=0.5)
    u, cond = jax.random.normal(jax.random.key(0), (8, 8, 2, 3)), {"label": jnp.array(2)}
    same = guided(model, lambda denoiser: ClassifierFree(denoiser, 1.0), cond)
    np.testing.assert_allclose(same(u, 0.5), model(u, 0.5, cond), rtol=1e-6)
    moved = guided(model, lambda denoiser: ClassifierFree(denoiser, 2.0), cond).denoise(u, 0.5)
    of_class, of_all = (model.denoise(u, 0.5, {"label": jnp.array(i)}) for i in (2, -1))
    np.testing.assert_allclose(moved, 2 * of_class - of_all, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (partial(Measured, operator=jnp.abs, measurement=jnp.zeros(SHAPE)), "operator is not linear"),
        (partial(Measured, operator=half, measurement=jnp.zeros(SHAPE)), r"measurement has shape \(4, 4, 3\), and the"),
        (partial(Measured, operator=half, measurement=jnp.zeros((2, 4, 3)), by="magic"), "by='magic' must be"),
        (
            partial(Measured, operator=half, measurement=np.zeros((2, 4, 3), complex)),
            "the measurement is complex: give its",
        ),
        (
            partial(Measured, operator=lambda x: jax.lax.complex(half(x), half(x)), measurement=jnp.zeros((2, 4, 3))),
            "is complex: give its",
        ),
        (partial(ClassifierFree, scale=2.0), "cond is None"),
        (partial(ClassifierFree, scale=np.nan), "scale=nan must be a finite number"),
        (partial(Classifier, log_likelihood=log_class, scale=np.inf), "scale=inf must be a finite number"),
        (partial(Autoguidance, worse=denoise, scale=2.0, interval=(3.0, 1.0)), r"interval=\(3.0, 1.0\) must be two"),
        (partial(Measured, operator=half, measurement=jnp.zeros((2, 4, 3)), noise_std=-1), "noise_std=-1.0 must be"),
        (partial(Measured, operator=half, measurement=jnp.zeros((2, 4, 3)), iterations=0), "iterations=0 must be"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_computed(make, says):
    with pytest.raises(ValueError, match=says):
        eqx.filter_jit(make(lambda y, sigma, cond=None: y))(jnp.ones(SHAPE), 0.5)


def test_a_denoiser_without_a_condition_and_an_operator_of_arrays_are_enough():
    """Of a network trained elsewhere, and of a mask that is traced, in a sampler's loop or one's own program."""
    elsewhere = gddim.as_denoiser(lambda x, t: jnp.tanh(x), gddim.VP())
    mask, y = jnp.asarray(np.indices(SHAPE).sum(0) % 2, jnp.float32), jnp.linspace(-1, 1, 48).reshape(SHAPE)
    of = lambda mask: Measured(elsewhere, eqx.Partial(jnp.multiply, mask), mask * 0.3, by="replacement")
    told = of(mask)(y, 0.5)
    np.testing.assert_allclose(jax.jit(lambda mask, y: of(mask)(y, 0.5))(mask, y), told, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(told[mask == 1], 0.3, rtol=1e-5)
    u = gddim.sample(gddim.GDDIM(2), gddim.VP(), gddim.through(gddim.VP(), of(mask)), y[..., None, :], [1.0, 0.3, 0.01])
    assert bool(jnp.isfinite(u).all())
    np.testing.assert_array_equal(Autoguidance(elsewhere, elsewhere, 2.0)(y, 0.5), elsewhere(y, 0.5))
    np.testing.assert_array_equal(Classifier(elsewhere, lambda y, sigma, cond: y.sum(), 0.0)(y, 0.5), elsewhere(y, 0.5))


def test_noise_with_a_spectrum_needs_its_basis():
    with pytest.raises(ValueError, match=r"sigma has shape \(4, 4\): give the process"):
        noise_covariance(jnp.ones(SHAPE), jnp.ones((4, 4)), None)
