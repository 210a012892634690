"""Laws of going back in time: what it may not change, and the bias that it takes away."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_guidance import PROCESSES, SHAPE, gaussian, of_gaussian

import gddim
from gddim import GDDIM, RePaint
from gddim.denoiser import Through
from gddim.guidance import Measured
from gddim.samplers.solver import AbstractSampler
from gddim.samplers.words import parse_sampler, sampler_name

__all__ = ["gaussian"]
TIMES = gddim.power_grid(1.0, 1e-3, steps=4)


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("sde", [*PROCESSES.values(), gddim.PSLD()], ids=lambda sde: type(sde).__name__)
def test_a_step_and_the_way_back_leave_the_state_the_law_that_it_has_given_the_data(sde, lam):
    """`N(ψ x₀, Σ_t)` goes to itself where the data foreseen are x₀, and by the last of its steps to that of s."""
    table = RePaint(3, lam).coefficients(sde, TIMES)
    assert table.psi.shape[0] == 12
    np.testing.assert_array_equal(table.times, np.repeat(TIMES[:-1], 3))
    np.testing.assert_array_equal(table.ts, np.append(np.repeat(TIMES[:-1], 3), TIMES[-1]))
    sigma = sde.covariance(table.ts)
    sigma = sigma.reshape(len(sigma), *(1,) * (table.psi.ndim - sigma.ndim), *sigma.shape[1:])
    psi = sde.transition(table.ts, np.zeros_like(table.ts))[..., :1]
    ahead = table.psi @ sigma[:-1] @ table.psi.swapaxes(-1, -2) + table.noise @ table.noise.swapaxes(-1, -2)
    size = np.sqrt(np.einsum("...ii,...jj->...ij", sigma[1:], sigma[1:]))
    np.testing.assert_allclose((ahead - sigma[1:]) / size, 0, atol=1e-8)
    assert table.record_data is not None
    mean = table.psi @ psi[:-1] + table.weights[:, 0] @ table.record_data[:-1]
    np.testing.assert_allclose(mean, np.broadcast_to(psi[1:], mean.shape), atol=1e-8)


def test_once_is_the_step_itself_and_its_word_says_how_often():
    one, other = RePaint(1, 0.3).coefficients(gddim.CLD(), TIMES), GDDIM(1, 0.3, interpolate="data")
    jax.tree.map(np.testing.assert_array_equal, one, other.coefficients(gddim.CLD(), TIMES))
    for word, sampler in (("repaint:16", RePaint(16)), ("repaint:4:lam=0", RePaint(4, 0.0))):
        assert parse_sampler(word) == sampler
        assert sampler_name(sampler) == word
    for word, says in (
        ("repaint:0", "repeats=0 must be a whole"), ("repaint:data", "no option"), ("repaint:2:lam=-1", "lam=-1.0 must be"),
    ):  # fmt: skip
        with pytest.raises(gddim.UserError, match=says):
            parse_sampler(word)


@pytest.mark.parametrize("name", ["VP", "CLD"])
def test_it_takes_bias_away_from_replacement(name, gaussian):
    """Of Gaussian colour images whose upper half is known: the mean of the lower half, in standard deviations."""
    sde, (mean, covariance) = PROCESSES[name], gaussian
    known, rest = np.arange(48) < 24, np.arange(48) >= 24
    truth = np.random.default_rng(1).multivariate_normal(mean, covariance)
    gain = covariance[rest][:, known] @ np.linalg.inv(covariance[known][:, known])
    exact = mean[rest] + gain @ (truth - mean)[known]
    spread = np.sqrt(np.diag(covariance[rest][:, rest] - gain @ covariance[known][:, rest]))
    b = jnp.asarray(truth[known].reshape(2, 4, 3), jnp.float32)
    replaced = Measured(of_gaussian(mean, covariance, None), lambda x: x[:2], b, by="replacement")

    def bias(sampler: AbstractSampler, calls: int) -> float:
        solver = gddim.Method(sampler, calls).solver(sde)

        @eqx.filter_jit
        def one(key):
            start, noise = jax.random.split(key)
            return sde.project(solver(Through(sde, replaced), sde.sample_prior(start, (4, 4, sde.k, 3)), noise).state)

        x = np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(2), 400))).reshape(400, np.prod(SHAPE))
        return float(np.sqrt(np.mean(((x.mean(0)[rest] - exact) / spread) ** 2)))

    again, plain = bias(RePaint(20), 100), [bias(GDDIM(2, interpolate="data"), 20), bias(GDDIM(1, 1.0), 100)]
    assert again < 0.7 * min(plain), (again, plain)
