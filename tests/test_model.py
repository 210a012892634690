"""The Denoiser: one network of white noise through every process, and of its own spectrum where coefficients have one."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_through import POINTS, PROCESSES

import gddim
from experiments.processes import blurred_langevin
from gddim.check import mixture_eps
from gddim.denoiser import implied_eps, reduction, statistic
from gddim.experiment import Model
from gddim.loss import LogNormalNoise, ScoreMatching
from gddim.model import VelocityModel, seen_through
from gddim.nn import NCSNppConfig
from gddim.sde import AbstractLinearSDE
from gddim.sde.base import positions

SPECTRAL = {"blurring": gddim.Blurring(2), "blurred CLD": blurred_langevin(2)}
STD = 0.6
SIGMAS = np.geomspace(1e-4, 1e4, 9)


def scales(sigma: Any) -> tuple[Any, Any, Any]:
    """c_skip, c_out, c_in."""
    total = STD**2 + sigma**2
    return STD**2 / total, STD * sigma / np.sqrt(total), 1 / np.sqrt(total)


def exact(sde: AbstractLinearSDE, t: Any) -> gddim.Denoiser:
    """The model whose network is perfect for the seven points, at the time t."""
    sigma = np.asarray(reduction(sde, t, jnp.float64)[0])[..., *[None] * bool(positions(sde))]
    skip, out, scale = scales(sigma)

    def net(x: Any, level: Any, cond: Any = None, *, key: Any = None) -> Any:
        np.testing.assert_allclose(level, np.log(sigma.ravel()[0]) / 4, rtol=1e-12)
        y, points = sde.from_pixels(x) / scale, sde.from_pixels(jnp.moveaxis(jnp.asarray(POINTS), 0, -1))
        gaps = (y[..., None] - points) / sigma[..., *[None] * bool(positions(sde))]
        share = jax.nn.softmax(-(gaps**2).sum((0, 1, 2)) / 2)
        return sde.to_pixels((points @ share - skip * y) / out)

    return gddim.Denoiser(sde, net, data_std=STD)


@pytest.mark.parametrize("name", PROCESSES | SPECTRAL)
def test_epsilon_of_a_perfect_network_is_that_of_the_process(name):
    """The seven points' posterior mean, in float64: for a spectrum of noise too."""
    sde, rng = (PROCESSES | SPECTRAL)[name], np.random.default_rng(1)
    with jax.enable_x64(True):
        centres = np.stack([sde.from_pixels(jnp.asarray(point)) for point in POINTS])
        true = eqx.filter_jit(mixture_eps(sde, centres, std=0.0))
        for t in np.geomspace(1e-3, 0.9 * sde.horizon, 4):
            noise = jnp.asarray(rng.normal(size=(2, 2, sde.k, 3)))
            u, t = sde.perturb(sde.lift(jnp.asarray(POINTS[0])), t, noise), jnp.asarray(t)
            expected = true(u, t)
            np.testing.assert_allclose(exact(sde, t)(u, t), expected, atol=1e-10 * float(jnp.abs(expected).max()))


def net(x: Any, level: Any, cond: Any = None, *, key: Any = None) -> Any:
    """Neither linear nor the same at all levels."""
    return jnp.tanh(2 * x[::-1] + level)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_model_is_its_denoiser_through_the_process(name):
    sde = PROCESSES[name]
    model = gddim.Denoiser(sde, net, data_std=STD)
    seen = gddim.through(sde, model.denoiser)
    u = jax.random.normal(jax.random.key(0), (4, 4, sde.k, 3))
    for t in (1e-3 * sde.horizon, sde.horizon):
        np.testing.assert_allclose(model.denoise(u, t), seen.denoise(u, t), rtol=1e-6)
        np.testing.assert_allclose(model(u, t), seen(u, t), rtol=1e-5, atol=1e-6)


def test_the_network_sees_the_channels_of_the_data_whatever_the_process():
    config = NCSNppConfig(width=8, multipliers=(1,), blocks=1, attention=(), embedding="positional")
    model = gddim.Denoiser(gddim.CLD(), config.build((8, 8, 3), 3, jax.random.key(0)))
    of_pixels = model.denoiser(jnp.ones((8, 8, 3)), 0.7)
    for sde in (*PROCESSES.values(), gddim.LinearSDE(*third_order())):
        other = seen_through(model, sde)
        assert jax.eval_shape(other, jnp.ones((8, 8, sde.k, 3)), 0.5).shape == (8, 8, sde.k, 3)
        np.testing.assert_array_equal(other.denoiser(jnp.ones((8, 8, 3)), 0.7), of_pixels)


def third_order():
    F = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, -1.0, -1.0]])
    return lambda t: 3 * F, lambda t: np.diag([0.0, 0.0, 6.0]), np.diag([1e-3, 0.1, 0.1])


def test_an_epsilon_of_one_field_is_seen_through_every_process_with_its_class():
    of_class = lambda x, level, cond=None, *, key=None: jnp.tanh(x + cond["label"]) * level / 999
    model, cond, t = gddim.EpsModel(gddim.VP(), of_class), {"label": 0.5}, jnp.asarray(0.4)
    for sde in (gddim.VE(), gddim.CLD()):
        seen, u = seen_through(model, sde), jax.random.normal(jax.random.key(0), (4, 4, sde.k, 3))
        y, sigma = statistic(sde, u, t)
        data = model.denoiser(y, sigma, cond)
        np.testing.assert_allclose(seen.denoise(u, t, cond), data, atol=1e-5)
        np.testing.assert_allclose(seen(u, t, cond, key=jax.random.key(1)), implied_eps(sde, u, t, data), atol=1e-3)


def test_a_network_that_belongs_to_its_process_stays_with_it():
    white, blurring = gddim.Denoiser(gddim.CLD(), net), gddim.Denoiser(gddim.Blurring(4), net)
    published, velocity = gddim.EpsModel(gddim.CLD(), net), VelocityModel(gddim.CLD(), net)
    for model in (white, blurring, published, velocity):
        assert seen_through(model, dataclasses.replace(model.sde)) is model
    for model, sde, why in (
        (published, gddim.VP(), "predicts the ε of CLD"),
        (velocity, gddim.VP(), "predicts the ε of CLD"),
        (gddim.EpsModel(gddim.Blurring(4), net), gddim.VP(), "Blurring has a spectrum of noise"),
        (blurring, gddim.VP(), "Blurring has a spectrum of noise"),
        (white, gddim.Blurring(4), "Blurring has a spectrum of noise"),
    ):
        with pytest.raises(gddim.UserError, match=why):
            seen_through(model, sde)
    with pytest.raises(ValueError, match=r"sigma has shape \(\); through Blurring noise has a spectrum \(4, 4\)"):
        blurring.denoiser(jnp.ones((4, 4, 3)), 0.5)


def test_a_network_of_the_logarithm_of_a_time_is_refused():
    fourier = NCSNppConfig(width=8, multipliers=(1,), blocks=1).build((8, 8, 1), 1, jax.random.key(0))
    with pytest.raises(gddim.UserError, match="take embedding positional"):
        gddim.Denoiser(gddim.CLD(), fourier)
    assert gddim.EpsModel(gddim.VP(), fourier)(jnp.ones((8, 8, 1, 1)), 0.5).shape == (8, 8, 1, 1)


def test_the_target_has_variance_one_at_every_noise_level():
    """And so has what the network sees."""
    x0 = STD * jax.random.normal(jax.random.key(0), (32, 32, 3))
    noise = jax.random.normal(jax.random.key(1), x0.shape)

    def zero(x: Any, level: Any, cond: Any = None, *, key: Any = None) -> Any:
        seen.append((jnp.mean(x**2), level))
        return jnp.zeros_like(x)

    model = gddim.Denoiser(gddim.CLD(), zero, data_std=STD)
    for sigma in SIGMAS:
        seen: list[Any] = []
        assert abs(model.loss_at(x0, sigma, noise) - 1) < 0.1
        assert abs(seen[0][0] - 1) < 0.1
        np.testing.assert_allclose(seen[0][1], np.log(sigma) / 4, rtol=1e-5)


@pytest.mark.parametrize("name", PROCESSES | SPECTRAL)
def test_the_loss_is_that_of_the_data_prediction_in_units_of_its_scale(name):
    """`mean ((x₀ − D(u, t))/c_out)²` at the state u that the same x₀ and ε make, whatever the process."""
    sde, t = (PROCESSES | SPECTRAL)[name], jnp.float32(0.3)
    model = gddim.Denoiser(sde, net, data_std=STD)
    x0 = STD * jax.random.normal(jax.random.key(0), (2, 2, 3))
    eps = jax.random.normal(jax.random.key(1), (2, 2, sde.k, 3))

    @jax.jit
    def both(t: Any) -> tuple[Any, Any]:
        sigma = reduction(sde, t, jnp.float32)[0][..., *[None] * bool(positions(sde))]
        gap = sde.from_pixels(x0) - model.denoise(sde.perturb(sde.lift(x0), t, eps), t)
        return model.loss(x0, t, eps), jnp.mean((gap * jnp.sqrt(STD**2 + sigma**2) / (STD * sigma)) ** 2)

    np.testing.assert_allclose(*both(t), rtol=2e-3)


@pytest.mark.parametrize("sde", [gddim.CLD(), gddim.VP(), gddim.Blurring(8)], ids=lambda sde: type(sde).__name__)
def test_the_gradient_vanishes_at_the_posterior_mean_alone(sde):
    """Of data N(0, v), `v ≠ s²`: `D = v/(v + σ²) y`, which a network of one number for each level can say."""
    v, x0 = 1.7, jnp.sqrt(1.7) * jax.random.normal(jax.random.key(0), (4096, 8, 8, 3))
    objectives = [ScoreMatching(sde, 2.0), *([] if positions(sde) else [LogNormalNoise()])]

    def loss(gain: Any, objective: Any) -> Any:
        def best(x: Any, level: Any, cond: Any = None, *, key: Any = None) -> Any:
            sigma = jnp.exp(4 * level)
            total = STD**2 + sigma**2
            return gain * (v / (v + sigma**2) - STD**2 / total) * total / (STD * sigma) * x

        return objective(gddim.Denoiser(sde, best, data_std=STD), x0, jax.random.key(1))

    for objective in objectives:
        slope = jax.jit(jax.grad(lambda gain, objective=objective: loss(gain, objective)))
        if positions(sde):  # one number says the lowest frequency alone
            assert jnp.isfinite(slope(1.0))
            continue
        low, at, high = map(float, (slope(0.5), slope(1.0), slope(1.5)))
        assert low < 0 < high
        assert abs(at) < 0.02 * high


@pytest.mark.parametrize("name", [*PROCESSES, "blurring 32"])
def test_epsilon_and_loss_are_finite_and_float32_everywhere(name):
    """From the least time that is trained on to the start, also where float64 is the default."""
    sde = gddim.Blurring(32) if name == "blurring 32" else PROCESSES[name]
    size = 32 if positions(sde) else 4
    model = gddim.Denoiser(sde, net, data_std=STD)
    eps = jax.random.normal(jax.random.key(0), (size, size, sde.k, 1))
    x0 = jnp.ones((size, size, 1))
    both = jax.jit(lambda t: (model(sde.perturb(sde.lift(x0), t, eps), t), model.loss(x0, t, eps)))
    for t in (1e-5, 0.1 * sde.horizon, sde.horizon):
        for wide in (False, True):
            with jax.enable_x64(wide):
                for found in both(jnp.float32(t)):
                    assert found.dtype == jnp.float32
                    assert jnp.isfinite(found).all()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("sde", [gddim.CLD(), gddim.PSLD(), gddim.CLD(m_inv=2.0, beta0=3.0, epsilon=1e-5)], ids=repr)
def test_a_velocitys_epsilon_determines_the_data(sde, mixed):
    """CLD-SGM's: of the exact score of the velocity alone come the data and the ε of both fields."""
    exact_eps, t = mixture_eps(sde, POINTS, std=0.0), 0.4
    u = np.asarray(jax.random.normal(jax.random.key(0), (2, 2, 2, 3)), np.float64)
    with jax.enable_x64(True):
        R, L = sde.noise_factor(t), sde.cholesky_factor(t)
        eps = np.asarray(exact_eps(jnp.asarray(u), t))
        published = np.linalg.solve(L, R @ eps)[..., 1, :] - mixed * L[1, 1] / sde.covariance(t)[1, 1] * u[..., 1, :]
        said = []

        def net(x: Any, level: Any, cond: Any = None, *, key: Any = None) -> Any:
            said.append(level)
            return jnp.asarray(published)

        model = gddim.model.VelocityModel(sde, net, mixed_score=mixed)
        np.testing.assert_allclose(model(jnp.asarray(u), t), eps, rtol=1e-6, atol=1e-7)
        data = np.linalg.solve(sde.transition(t, 0.0), u - R @ eps)[..., 0, :]
        np.testing.assert_allclose(model.denoise(jnp.asarray(u), t), data, rtol=1e-6, atol=1e-7)
    assert set(said) == {t}


def test_only_a_process_of_position_and_velocity_has_a_velocity():
    for sde in (gddim.VP(), blurred_langevin(2)):
        with pytest.raises(ValueError, match="no process of position and velocity"):
            gddim.model.VelocityModel(sde, lambda x, level, cond=None, *, key=None: x)


def test_an_epsilon_of_one_field_is_a_denoiser_told_times_as_it_was():
    """Discrete times counted from 0, a condition, and the data that ε implies."""
    sde, said = gddim.VP.from_betas(np.linspace(1e-4, 0.02, 1000)), []

    def net(x: Any, level: Any, cond: Any = None, *, key: Any = None) -> Any:
        said.append(float(level))
        return 0.3 * x + cond

    model = gddim.EpsModel(sde, net, time_scale=1.0, offset=-1.0)
    t, y = 400.0, jnp.asarray(POINTS[0], jnp.float32)
    alpha, sigma = sde.transition(t, 0.0)[0, 0], sde.noise_factor(t)[0, 0]
    found = model.denoiser(y, sigma / alpha, jnp.float32(0.5))
    np.testing.assert_allclose(said, [399.0], rtol=1e-4)
    eps = model(alpha * y[..., None, :], t, jnp.float32(0.5))[..., 0, :]
    np.testing.assert_allclose(found, y - sigma / alpha * eps, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="must have one field"):
        gddim.EpsModel(gddim.CLD(), net).denoiser(y, 1.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mixed_score": True}, "a network that predicts eps or velocity is accepted, not data"),
        (
            {"predicts": "eps", "time_scale": -1.0},
            "time_scale -1.0 of a network that predicts eps: accepted is a number > 0",
        ),
        (
            {"time_scale": 1.0},
            "of a network that predicts data: accepted is a number > 0, of one that predicts eps or vel",
        ),
        (
            {"predicts": "velocity", "time_offset": 2.0},
            "time_offset 2.0 of a network that predicts velocity: accepted is",
        ),
    ],
)
def test_what_a_network_is_told_wrongly_is_said_with_what_is_accepted(options, says):
    with pytest.raises(gddim.UserError, match=says):
        Model(**options)
