"""What happens between steps: a callback in the compiled loop, and the path that `sample` returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from gddim import GDDIM
from gddim.check import mixture_eps

CLD = gddim.CLD()
TIMES = gddim.power_grid(1.0, 1e-2, steps=4)
SHAPE = (4, 4, 3)
EPS = mixture_eps(CLD, np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE)), std=0.1)
DATA = gddim.through(CLD, lambda y, sigma: jnp.tanh(y / (1 + sigma)))
U = jax.random.normal(jax.random.key(0), (4, 4, 2, 3))
SAMPLERS = [
    (GDDIM(3), EPS), (GDDIM(2, 0.5), EPS), (GDDIM(2, corrector=True), EPS), (GDDIM(3, interpolate="data"), DATA),
    (GDDIM(2, 0.5, corrector=True, interpolate="data"), DATA), (gddim.Heun(), EPS), (gddim.SSCS(), EPS),
]  # fmt: skip


def draw(sampler, eps_fn, **how):
    return gddim.sample(sampler, CLD, eps_fn, U, TIMES, jax.random.key(1), **how)


@pytest.mark.parametrize(("sampler", "eps_fn"), SAMPLERS, ids=[repr(sampler) for sampler, _ in SAMPLERS])
@pytest.mark.parametrize("last", ["none", "data"])
def test_a_callback_sees_each_step_once_and_its_state_goes_on(sampler, eps_fn, last):
    seen = []

    def look(u, data, t):
        jax.debug.callback(lambda *all_three: seen.append(all_three), u, data, t, ordered=True)
        return u

    found, path = draw(sampler, eps_fn, last=last, callback=look, return_path=True)
    jax.effects_barrier()
    np.testing.assert_array_equal(found, draw(sampler, eps_fn, last=last))
    assert len(seen) == len(TIMES) - 1 + (last == "data")
    if last == "none":
        times, ahead = sorted({float(t) for _, _, t in seen}, reverse=True), np.asarray(TIMES[1:])
        if isinstance(sampler, gddim.SSCS):  # whose half steps join: its states are those at its next call
            ahead[:-1] = (ahead[1:] + ahead[:-1]) / 2
        np.testing.assert_allclose(times, ahead, rtol=1e-6)
    np.testing.assert_array_equal(next(u for u, _, t in seen[::-1] if t == seen[-1][2]), found)
    if len(path.times) == len(TIMES) - 1:  # no corrector, no final call
        np.testing.assert_allclose(jnp.stack([data for _, data, _ in seen]), path.foreseen[..., 0, :], atol=1e-5)
        np.testing.assert_array_equal(path.states[1:], jnp.stack([u for u, _, _ in seen])[:-1])
    halved = draw(sampler, eps_fn, last=last, callback=lambda u, data, t: 0.5 * u)
    assert jnp.abs(halved - found).max() > 1e-2


def test_what_is_known_of_an_image_is_kept_at_every_noise_level():
    """Inpainting by replacement: the known pixels of the state are those of the data, noised."""
    known, truth = jnp.arange(4)[:, None, None, None] < 2, jnp.asarray(np.random.default_rng(1).uniform(-1, 1, SHAPE))
    noise = jax.random.normal(jax.random.key(2), U.shape)

    def replace(u, data, t):
        return jnp.where(known, CLD.perturb(CLD.lift(truth), t, noise), u)

    found = gddim.sample(GDDIM(2), CLD, EPS, U, gddim.power_grid(1.0, 1e-4, steps=8), callback=replace)
    np.testing.assert_allclose(CLD.project(found)[:2], truth[:2], atol=0.02)


def test_a_callback_of_another_shape_and_a_sampler_without_steps_are_refused():
    with pytest.raises(ValueError, match=r"callback returned shape \(4, 4, 3\) for a state of shape \(4, 4, 2, 3\)"):
        draw(GDDIM(1), EPS, callback=lambda u, data, t: data)
    for how in ({"callback": lambda u, data, t: u}, {"return_path": True}):
        with pytest.raises(ValueError, match="RK45 chooses its own steps"):
            draw(gddim.RK45(), EPS, **how)
