"""Likelihood against its exact value on Gaussian data, and encoding as the inverse of sampling."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy.stats import norm
from test_samplers import Relaxing

from gddim.data import ArraySource
from gddim.evaluation.likelihood import bits_per_dimension, log_density
from gddim.samplers import power_grid
from gddim.samplers.inversion import Coder, encoding_table, interpolate, reconstruct
from gddim.sde import CLD, VP, AbstractLinearSDE, Blurring
from gddim.sde.linalg import aligned, inverse, product, transpose

STD = 0.5


class Exact(eqx.Module):
    """ε of data that are N(0, STD²) at every position: `RᵀS⁻¹u`, `S = Σ_t + STD² ψψᵀ`."""

    sde: Any

    def __call__(self, u: Array, t: Array, key: None = None) -> Array:
        psi = self.sde.transition(t, jnp.zeros_like(t))[..., :, :1]
        sigma, signal, R = aligned(self.sde.covariance(t), product(psi, transpose(psi)), self.sde.noise_factor(t))
        return product(transpose(R), product(inverse(sigma + STD**2 * signal), u))


class Skewed(eqx.Module):
    """`Exact` for data `(x, y)` with correlation ½ between neighbouring channels: its derivative is not diagonal."""

    sde: Any
    covariance: tuple = eqx.field(static=True, default=((0.25, 0.125), (0.125, 0.25)))

    def __call__(self, u: Array, t: Array, key: None = None) -> Array:
        alpha, R = self.sde.transition(t, 0.0)[..., 0, 0] ** 2, self.sde.noise_factor(t)[..., 0, 0]
        S = alpha * jnp.asarray(self.covariance, u.dtype) + R**2 * jnp.eye(2, dtype=u.dtype)
        return R * jnp.linalg.solve(S, u[0])[None, :]


def gaussian(count: int, shape: tuple[int, ...]) -> np.ndarray:
    return (STD * np.random.default_rng(0).standard_normal((count, *shape))).astype(np.float32)


def exact_bits(x: np.ndarray) -> np.ndarray:
    return -norm.logpdf(x, scale=STD).reshape(len(x), -1).mean(axis=1) / np.log(2)


@pytest.mark.parametrize(("sde", "shape"), [(VP(), (3,)), (Blurring(4), (4, 4, 1)), (CLD(), (3,))])
def test_bits_per_dimension_of_gaussian_data_are_exact(sde: AbstractLinearSDE, shape: tuple[int, ...]):
    x = gaussian(64, shape)
    found = bits_per_dimension(Exact(sde), ArraySource(x), batch=64)
    exact = exact_bits(x)
    assert abs(found.mean - exact.mean()) < found.standard_error
    assert found.standard_error == pytest.approx(exact.std(ddof=1) / 8, rel=0.05)
    assert np.abs(found.each - exact).max() < 2e-3  # record by record, not on average alone


class Bent(eqx.Module):
    sde: AbstractLinearSDE

    def __call__(self, u: Array, t: Array) -> Array:
        return jnp.tanh(u)


def test_the_likelihood_of_a_process_in_jax_numpy_alone_is_that_of_its_closed_form():
    x = jnp.asarray([0.3, -0.7, 0.1])
    found = [
        eqx.filter_jit(log_density)(Bent(sde), x, jax.random.key(0), t_min=1e-3)
        for sde in (Relaxing(horizon=1.0), VP(2.0, 2.0))
    ]
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_hutchinson_estimate_is_unbiased_where_it_is_noisy_and_its_error_is_told():
    model = Skewed(VP())
    covariance = np.array(model.covariance)
    x = np.random.default_rng(1).multivariate_normal(np.zeros(2), covariance, 400).astype(np.float32)
    inverse_covariance = np.linalg.inv(covariance)
    log_p = -0.5 * np.einsum("ni,ij,nj->n", x, inverse_covariance, x)
    log_p -= 0.5 * np.log(np.linalg.det(2 * np.pi * covariance))
    exact = -log_p / (2 * np.log(2))
    found = bits_per_dimension(model, ArraySource(x), batch=400)
    error = found.each - exact
    assert error.std() > 0.01
    assert abs(error.mean()) < 3 * error.std() / 20
    many = bits_per_dimension(model, ArraySource(x), batch=400, probes=8)
    assert (many.each - exact).std() == pytest.approx(error.std() / np.sqrt(8), rel=0.2)


def test_images_are_dequantised_and_records_do_not_depend_on_the_batch():
    levels = np.clip(np.round((gaussian(48, (2, 2, 1)) + 1) * 127.5), 0, 255).astype(np.uint8)
    x = levels / 127.5 - 1
    probability = norm.cdf(x + 0.5 / 127.5, scale=STD) - norm.cdf(x - 0.5 / 127.5, scale=STD)
    exact = -np.log2(probability).reshape(48, -1).mean(axis=1)
    whole = bits_per_dimension(Exact(VP()), ArraySource(levels), batch=48)
    assert np.abs(whole.each - exact).max() < 0.02
    parts = bits_per_dimension(Exact(VP()), ArraySource(levels), records=40, batch=16)
    np.testing.assert_allclose(parts.each, whole.each[:40], atol=1e-4)
    with pytest.raises(ValueError, match="accepted are 2 to 48"):
        bits_per_dimension(Exact(VP()), ArraySource(levels), records=49)


@pytest.mark.parametrize("sde", [VP(), Blurring(4), CLD()])
def test_encoding_is_sampling_with_s_and_t_exchanged(sde: AbstractLinearSDE):
    ts = power_grid(sde.horizon, 1e-3, 5)
    table = encoding_table(sde, ts, order=1)
    rising = ts[::-1]
    for i, (s, t) in enumerate(itertools.pairwise(rising)):
        psi, R_t, R_s = aligned(sde.transition(t, s), sde.noise_factor(t), sde.noise_factor(s))
        np.testing.assert_allclose(table.psi[i], psi, rtol=1e-10)
        np.testing.assert_allclose(table.weights[i, 0], R_t - psi @ R_s, atol=1e-9 * np.abs(R_t).max())
    if not np.any(sde.noise_factor(0.0)):
        with pytest.raises(ValueError, match="where R is singular; end the grid at a t_min > 0"):
            encoding_table(sde, power_grid(sde.horizon, 0, 5))
    high = encoding_table(sde, ts, order=3)
    np.testing.assert_allclose(
        high.weights.sum(axis=1), table.weights.sum(axis=1), atol=1e-9 * np.abs(high.weights).max()
    )
    assert np.abs(high.weights[2, 2]).max() > 0


@pytest.mark.parametrize(("sde", "dims"), [(VP(), ()), (Blurring(4), (4, 4)), (CLD(), ())])
def test_data_come_back_from_their_latents_which_look_like_the_prior(sde: AbstractLinearSDE, dims: tuple[int, ...]):
    x = jnp.asarray(gaussian(256 if not dims else 64, (*dims, 2)))
    errors = []
    for steps in (40, 80):
        coder = Coder.of(Exact(sde), power_grid(sde.horizon, 1e-3, steps), order=2)
        found = reconstruct(coder, x, jax.random.split(jax.random.key(0), len(x)))
        errors.append(float(found.error.mean()))
    assert errors[1] < errors[0] / 2.8  # second order, and a half is lost to the first steps
    assert errors[1] < 0.01
    assert float(jnp.sqrt(jnp.mean((found.data - x) ** 2))) < 0.03
    whitened = jax.vmap(lambda latent: product(jnp.asarray(coder.whiten, jnp.float32), latent))(found.latents)
    assert float(whitened.std()) == pytest.approx(1, abs=0.06)


def test_interpolations_begin_and_end_at_the_data_and_stay_typical():
    model = Exact(VP())
    coder = Coder.of(model, power_grid(1.0, 1e-3, 60), order=2)
    a, b = jnp.asarray(gaussian(40, (6,)))[:20], jnp.asarray(gaussian(40, (6,)))[20:]
    rows = interpolate(coder, a, b, 5, jax.random.split(jax.random.key(1), 20))
    assert rows.shape == (20, 5, 6)
    assert float(jnp.abs(rows[:, 0] - a).max()) < 0.06
    assert float(jnp.abs(rows[:, -1] - b).max()) < 0.06
    spread = np.asarray(rows.std(axis=(0, 2)))
    np.testing.assert_allclose(spread, STD, rtol=0.2)  # a straight line's middle would have 0.7 of it
