"""Laws of the grids: each is uniform in what it says, ends exactly where it was asked to, and has a word."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from experiments import cld_digits
from gddim import GDDIM, AnalyticStart
from gddim.errors import UserError
from gddim.experiment import Sampling
from gddim.experiment.cli import parse
from gddim.experiment.measure import cells
from gddim.experiment.workdir import describe
from gddim.samplers.grids import noise_level
from gddim.samplers.words import Grid, OnGrid, parse_grid, parse_sampler, sampler_name

PROCESSES = [
    gddim.VP(), gddim.CLD(), gddim.VE(), gddim.FlowMatching(), gddim.PSLD(), gddim.CriticallyDamped(3), gddim.Blurring(4),
]  # fmt: skip
name = lambda sde: type(sde).__name__


@pytest.mark.parametrize("sde", PROCESSES, ids=name)
def test_a_band_grid_is_uniform_in_its_clock_decreases_and_ends_exactly(sde):
    T = sde.horizon
    for lo, hi, data_std in ((0.06, 6.0, 0.5), (0.2, 1.0, 2.0)):
        grid = gddim.band_grid(sde, T, 1e-3 * T, 9, data_std, lo, hi)
        assert grid[0] == T
        assert grid[-1] == 1e-3 * T
        assert np.all(np.diff(grid) < 0)
        phi = -np.log1p((hi - lo) * data_std / (noise_level(sde, grid) + lo * data_std))  # log((r + lo s)/(r + hi s))
        np.testing.assert_allclose(np.diff(phi, 2), 0, atol=1e-9)


@pytest.mark.parametrize("sde", PROCESSES, ids=name)
def test_the_level_of_noise_is_the_inverse_of_the_precision_that_the_state_gives_of_the_data(sde):
    t = 0.3 * sde.horizon
    psi, sigma = sde.transition(t, 0.0)[..., :, :1], sde.covariance(t)
    precision = (psi.swapaxes(-1, -2) @ np.linalg.inv(sigma) @ psi).reshape(-1)[0]
    np.testing.assert_allclose(noise_level(sde, np.array([t])), precision**-0.5, rtol=1e-9)


def test_a_band_scales_with_the_data():
    """In VE, where r = t, data twice as large are the same data at twice the time."""
    sde = gddim.VE()
    grids = [gddim.band_grid(sde, s * 20.0, s * 0.01, 7, data_std=s * 0.5) for s in (1.0, 2.0)]
    np.testing.assert_allclose(2 * grids[0], grids[1], rtol=1e-9)
    narrow = gddim.band_grid(gddim.VP(), 1.0, 1e-3, 10, data_std=0.05)
    assert np.all(narrow[1:-1] < gddim.band_grid(gddim.VP(), 1.0, 1e-3, 10)[1:-1])


@pytest.mark.parametrize("sde", [gddim.VP(), gddim.CLD(), gddim.PSLD()], ids=name)
def test_a_band_leaves_extremes_to_more_steps(sde):
    several = [(5, (0.3, 4.0)), (6, (0.3, 4.0)), (7, (0.15, 3.0)), (10, (0.15, 3.0))]
    wide = [(steps, (0.06, 6.0)) for steps in (5, 6, 7, 10)]
    few = [(steps, (0.4, 6.0 if sde.k == 1 else 3.0)) for steps in (1, 4)]
    for steps, band in [*few, *(wide if sde.k == 1 else several), (11, (0.06, 6.0))]:
        told, own = (gddim.band_grid(sde, 1.0, 1e-3, steps, 0.5, *each) for each in (band, ()))
        np.testing.assert_array_equal(own, told)


def tuned_shares(steps):
    level = -np.log1p((3.0 - 0.03) / (gddim.tuned_grid(gddim.VE(), 80.0, 0.002, steps) + 0.03))
    return (level - level[0]) / (level[-1] - level[0])


def test_a_tuned_grid_follows_ends_and_data_and_differs_by_fields():
    for steps in range(1, 17):
        grids = [gddim.tuned_grid(gddim.VE(), s * 80.0, s * 0.002, steps, data_std=s * 0.5) for s in (1.0, 2.0)]
        np.testing.assert_allclose(grids[1], 2 * grids[0], rtol=1e-9)
        assert len(grids[0]) == steps + 1
        assert np.all(np.diff(grids[0]) < 0)
        assert (grids[0][0], grids[0][-1]) == (80.0, 0.002)
        own, band = (make(gddim.CLD(), 1.0, 1e-3, steps) for make in (gddim.tuned_grid, gddim.band_grid))
        assert np.array_equal(own, band) == (steps not in (6, 7, 8, 9, 10, 15))
    r = gddim.tuned_grid(gddim.VE(), 80.0, 0.01, 8)  # close to those that were learned, on other ends
    np.testing.assert_allclose(r[1:4], [3.51, 1.39, 0.643], rtol=0.05)
    parts = [tuned_shares(steps) for steps in (6, 7, 8)]  # of the way, at every part of the steps
    between = [np.interp(np.linspace(0, 1, 8), np.linspace(0, 1, len(part)), part) for part in parts]
    np.testing.assert_allclose(between[1], (between[0] + between[2]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("sde", "steps", "lo"), [(gddim.VP(), 4, 0.2), (gddim.VP(), 12, 0.03), (gddim.CLD(), 20, 0.03)]
)
def test_the_lower_end_of_a_band_does_not_grow_with_the_size_of_images(sde, steps, lo):
    told = gddim.band_grid(sde, 1.0, 1e-3, steps, data_std=1.0, lo=lo, hi=24.0)
    for make, name in ((gddim.tuned_grid, "tuned"), (gddim.band_grid, "band")):
        times = make(sde, 1.0, 1e-3, steps, data_std=4.0, rms=0.5)
        np.testing.assert_allclose(times, told, rtol=1e-9)
        np.testing.assert_array_equal(Grid(name, data_std=4.0)(sde, 1.0, 1e-3, steps), times)


@pytest.mark.parametrize(("sde", "steps"), [(gddim.VP(), 7), (gddim.VP(), 8), (gddim.CLD(), 4), (gddim.CLD(), 8)])
def test_those_of_5_to_10_steps_and_few_of_several_fields_do(sde, steps):
    for make in (gddim.tuned_grid, gddim.band_grid):
        by_size = make(sde, 1.0, 1e-3, steps, data_std=4.0, rms=0.5)
        np.testing.assert_array_equal(by_size, make(sde, 1.0, 1e-3, steps, data_std=4.0))


def test_a_wide_band_is_log_snr_and_ends_may_be_0():
    sde = gddim.VP()
    wide = gddim.band_grid(sde, 1.0, 1e-3, 6, lo=1e-9, hi=1e9)
    np.testing.assert_allclose(wide, gddim.log_snr_grid(sde, 1.0, 1e-3, 6), rtol=1e-6)
    assert gddim.band_grid(sde, 1.0, 0.0, 5)[-1] == 0


def test_the_karras_grid_is_edms():
    sigma = (80 ** (1 / 7) + np.arange(9) / 8 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(gddim.karras_grid(gddim.VE(), 80.0, 0.002, 8), sigma, rtol=1e-9)
    r = noise_level(gddim.CLD(), gddim.karras_grid(gddim.CLD(), 1.0, 1e-3, 8, rho=3))
    np.testing.assert_allclose(np.diff(r ** (1 / 3), 2), 0, atol=1e-9)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("power", lambda sde: gddim.power_grid(1.0, 1e-3, 6)),
        ("power:7", lambda sde: gddim.power_grid(1.0, 1e-3, 6, 7.0)),
        ("band", lambda sde: gddim.band_grid(sde, 1.0, 1e-3, 6, data_std=0.3)),
        ("band:0.16:3", lambda sde: gddim.band_grid(sde, 1.0, 1e-3, 6, data_std=0.3, lo=0.16, hi=3)),
        ("tuned", lambda sde: gddim.tuned_grid(sde, 1.0, 1e-3, 6, data_std=0.3)),
        ("log-snr", lambda sde: gddim.log_snr_grid(sde, 1.0, 1e-3, 6)),
        ("karras:5", lambda sde: gddim.karras_grid(sde, 1.0, 1e-3, 6, 5)),
        ("two-phase:0.5:0.4", lambda sde: gddim.two_phase_grid(1.0, 1e-3, 6, 0.5, 0.4)),
        ("uniform", lambda sde: gddim.uniform_grid(1.0, 1e-3, 6)),
    ],
)
def test_grids_have_words(word, expected):
    grid = parse_grid(word)
    assert str(grid) == word
    assert parse_grid(str(grid)) == grid
    for sde in (gddim.VP(), gddim.CLD()):
        np.testing.assert_array_equal(grid(sde, 1.0, 1e-3, 6, data_std=0.3), expected(sde))


@pytest.mark.parametrize(
    ("word", "says"),
    [("cosine", "unknown grid"), ("power:x", "'x'"), ("power:0", "power=0.0"), ("power:2:3", "takes 1 number"),
     ("band:3:1", "lo=3.0"), ("log-snr:2", "takes no number"), ("karras:-1", "rho"), ("band:nan", "lo=nan"),
     ("band:data_std=0", "data_std=0")],
)  # fmt: skip
def test_a_word_that_is_no_grid_is_refused_in_one_line(word, says):
    with pytest.raises(UserError, match=says) as caught:
        parse_grid(word)
    assert "\n" not in str(caught.value)
    assert "band" in str(caught.value)


@pytest.mark.parametrize("wrong", [dict(lo=0.0), dict(lo=2.0, hi=1.0), dict(data_std=0.0), dict(hi=np.inf)])
def test_a_band_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="a band needs"):
        gddim.band_grid(gddim.VP(), 1.0, 1e-3, 5, **wrong)
    for rms in (0.0, -1.0, 0.6, np.nan):
        with pytest.raises(ValueError, match=r"needs 0 < rms ≤ data_std"):
            gddim.band_grid(gddim.VP(), 1.0, 1e-3, 4, rms=rms)


def test_a_sampler_may_bring_its_grid():
    sde, ts = gddim.CLD(), gddim.power_grid(1.0, 1e-3, 4)
    on = parse_sampler("afs:gddim:2:residual:data_std=0.25@band:0.1:4")
    assert on == OnGrid(AnalyticStart(GDDIM(2, interpolate="residual", data_std=0.25)), Grid("band", (0.1, 4.0)))
    assert on == parse_sampler(sampler_name(on))
    assert on.sampler.noise_unit == 0.25
    np.testing.assert_array_equal(on.times(sde, ts), OnGrid(on.sampler.sampler, on.grid).times(sde, ts))
    on, eps_fn, u = (
        parse_sampler("gddim:2:residual:data_std=0.25@band:0.1:4"),
        lambda u, t: jnp.tanh(u),
        jnp.ones((2, 3)),
    )
    band = gddim.band_grid(sde, 1.0, 1e-3, 4, data_std=0.25, lo=0.1, hi=4.0)
    expected = gddim.sample(on.sampler, sde, eps_fn, u, band)
    np.testing.assert_array_equal(gddim.sample(on, sde, eps_fn, u, ts), expected)
    assert gddim.Method(on, 4, t_min=1e-3).solver(sde).nfe == 4
    with pytest.raises(UserError, match="unknown grid"):
        parse_sampler("gddim:3@cosine")


def test_an_experiment_lays_out_times_by_a_word_which_those_samplers_that_bring_a_grid_keep():
    argv = ["--sampling.grid", "band:0.1", "--sampler", "gddim:2:data"]
    sampling = parse(cld_digits.EXPERIMENT, argv).experiment.sampling
    assert describe(sampling)["grid"] == "band:0.1"
    assert sampler_name(sampling.method(gddim.CLD(), (8, 8, 1)).sampler) == "gddim:2:data@band:0.1"
    for word in ("gddim:2@power:3", "rk45"):
        kept = dataclasses.replace(sampling, sampler=parse_sampler(word))
        assert sampler_name(kept.method(gddim.CLD(), (8, 8, 1)).sampler) == word
    np.testing.assert_array_equal(
        sampling.flow_grid(gddim.VP(), (8, 8, 1), 6), gddim.band_grid(gddim.VP(), 1.0, 1e-3, 6, lo=0.1)
    )
    table = dataclasses.replace(cld_digits.EXPERIMENT.eval, nfe=(6,))
    experiment = dataclasses.replace(cld_digits.EXPERIMENT, sampling=sampling, eval=table)
    told = [cell.describe() for cell in cells(experiment)]
    assert {(cell["sampler"].partition("@")[2], cell["power"]) for cell in told} == {("band:0.1", None)}
    with pytest.raises(UserError, match="not both"):
        dataclasses.replace(sampling, power=3.0)


def test_the_grid_of_the_default_gives_way_to_one_that_is_told():
    named = lambda **told: sampler_name(Sampling(**told).method(gddim.CLD(), (8, 8, 1)).sampler)
    assert named() == "gddim:3:free:data@tuned"
    assert named(grid=Grid("power", (7.0,))) == "gddim:3:free:data@power:7"
    assert named(power=3.0) == "gddim:3:free:data"
