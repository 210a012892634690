"""The scale of data: noise levels of few calls grow with the root of how many numbers an image has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from experiments.solvers.images import drawn_by, exact
from gddim.experiment import Sampling
from gddim.loading import Loaded
from gddim.samplers.words import BEST, Grid, parse_sampler, sampler_name
from gddim.sde.blurring import idct2

IMAGES, NOISES = 200, 24


def smooth(shape: tuple[int, ...]) -> np.ndarray:
    """Images whose frequencies fall off as those of photographs do, in [-1, 1] or so, rms 0.5, `(IMAGES, *shape)`."""
    rng = np.random.default_rng(0)
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])
    colour = np.linalg.cholesky(0.1 * np.eye(shape[2]) + 0.9)
    waves = rng.standard_normal((IMAGES, *shape)) / (1 + np.hypot(rows, columns))[..., None] @ colour.T
    found = np.asarray(jax.vmap(idct2)(jnp.asarray(waves)))
    return (0.5 * found / found.std()).astype(np.float32)


def errors(sde: gddim.AbstractLinearSDE, images: np.ndarray, words: list[str], nfe: int) -> list[float]:
    """Median distance to the flow of these images' own exact denoiser, of samplers at so many calls."""
    shape = images.shape[1:]
    keys = jax.random.split(jax.random.key(1), NOISES)
    prior = jax.vmap(lambda key: sde.sample_prior(key, (*shape[:-1], sde.k, shape[-1])))(keys)
    model = gddim.through(sde, exact(images))
    ends = lambda word, nfe: drawn_by(model, prior, shape, parse_sampler(word), nfe)
    truth = ends("gddim:3:data", 64)
    return [float(np.median(np.sqrt(np.mean((ends(word, nfe) - truth) ** 2, (1, 2, 3))))) for word in words]


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD()], ids=["vp", "cld"])
def test_few_calls_are_spent_where_images_are_decided(sde):
    by_shape, small = errors(
        sde, smooth((32, 32, 3)), ["gddim:3:data:free@tuned", "gddim:3:data:free:data_std=0.5@tuned"], 6
    )
    assert by_shape < 0.35 * small


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("gddim:3:data:free@tuned", "gddim:3:free:data:data_std=3.46@tuned"),
        ("gddim:3:residual", "gddim:3:residual:data_std=3.46"),
        ("gddim:2:data@band:0.1", "gddim:2:data@band:0.1:data_std=3.46"),
        ("afs:gddim:2:data@band", "afs:gddim:2:data@band:data_std=3.46"),
        ("unipc:2@tuned", "unipc:2@tuned:data_std=3.46"),
        ("gddim:3:data:free@band:data_std=2", "gddim:3:free:data:data_std=3.46@band:data_std=2"),
        ("gddim:2:data:data_std=0.5@band", "gddim:2:data:data_std=0.5@band"),
        ("gddim:3:data", "gddim:3:data"),  # needs none
        ("gddim:3", "gddim:3"),
        ("gddim:3:data:free:data_std=0.5@tuned", "gddim:3:free:data:data_std=0.5@tuned"),  # has its own
        ("unipc:2@power:7", "unipc:2@power:7"),
    ],
)
def test_a_sampler_takes_the_scale_of_a_shape_where_it_needs_one_and_has_none(word, told):
    scaled = parse_sampler(word).for_data((32, 32, 3))
    assert sampler_name(scaled) == told
    assert parse_sampler(told) == scaled
    assert parse_sampler(word).for_data((8, 8, 1)) == parse_sampler(word)  # 0.5 as everywhere


@pytest.mark.parametrize(
    ("word", "unit"),
    [
        ("unipc:2@band", 3.46),
        ("unipc:2@band:data_std=0.7", 0.7),
        ("gddim:3:data:data_std=0.7@band", 0.7),
        ("heun@band", 3.46),
    ],
)
def test_a_grid_is_in_its_own_unit_or_the_samplers_or_that_of_the_shape(word, unit):
    sde, even = gddim.CLD(), gddim.uniform_grid(1.0, 1e-3, 6)
    times = parse_sampler(word).for_data((32, 32, 3)).times(sde, even)
    np.testing.assert_array_equal(times, gddim.band_grid(sde, 1.0, 1e-3, 6, data_std=unit))


def test_runs_sample_with_the_scale_of_their_data():
    sde, sampling = gddim.VP(), Sampling(nfe=8)
    assert sampling.sampler == BEST
    method = sampling.method(sde, (32, 32, 3))
    assert sampler_name(method.sampler) == "gddim:3:free:data:data_std=3.46@tuned"
    times = gddim.tuned_grid(sde, 1.0, 1e-3, 8, gddim.data_scale((32, 32, 3)))[:-1]
    loaded = Loaded(gddim.Denoiser(sde, lambda x, level, cond=None, *, key=None: 0 * x), (32, 32, 3), sampling)
    for solver in (method.solver(sde), loaded.through()[1]):
        np.testing.assert_array_equal(solver.times, times)
    own = dataclasses.replace(sampling, sampler=parse_sampler("gddim:3:residual:data_std=2"))
    assert own.method(sde, (32, 32, 3)).sampler == own.sampler


def test_the_scale_grows_with_the_root_of_how_many_numbers_data_are():
    shapes = [(2,), (8, 8, 1), (32, 32, 3), (64, 64, 3)]
    assert [gddim.data_scale(shape) for shape in shapes] == [0.5, 0.5, 3.46, 6.93]


def test_both_ways_of_the_flow_are_laid_out_in_the_units_that_sampling_has():
    sde, shape = gddim.VP(), (32, 32, 3)
    for word, unit in (("gddim:3:data", gddim.data_scale(shape)), ("gddim:3:data:data_std=0.7", 0.7)):
        sampling = Sampling(sampler=parse_sampler(word), grid=Grid("band"))
        np.testing.assert_array_equal(
            sampling.flow_grid(sde, shape, 6), gddim.band_grid(sde, 1.0, 1e-3, 6, data_std=unit)
        )
