"""The benchmark of solvers: its mixtures are what they say, its truth is a flow's, and it refuses what cannot be."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gddim
from experiments.solvers import images, tune
from experiments.solvers.__main__ import T_MIN, main, problem, typical
from experiments.solvers.mixtures import DATA_STD, KINDS, mixture
from gddim.samplers.grids import BAND
from gddim.samplers.solver import sharing


def draw(made, rng, n):
    """Samples of a mixture."""
    weights = np.exp(np.asarray(made.log_weights, np.float64))
    i = rng.choice(len(weights), n, p=weights / weights.sum())
    d, r = made.bases.shape[1:]
    along = rng.normal(size=(n, r)) * np.sqrt(made.spreads[i])
    noise = np.sqrt(made.variances[i])[:, None] * rng.normal(size=(n, d))
    return made.centres[i] + np.einsum("ndr,nr->nd", made.bases[i], along) + noise


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_has_the_stated_scale_and_its_denoiser_is_the_mean_of_its_data(kind):
    """The best of all functions of y: its error is unchanged to first order by any other, here by linear ones."""
    made, rng = mixture(kind, 3), np.random.default_rng(0)
    x = draw(made, rng, 20_000)
    assert np.sqrt(np.mean(x**2)) == pytest.approx(DATA_STD, rel=0.05)
    with jax.enable_x64(True):
        for sigma in (0.05, 0.4, 3.0):
            y = x + sigma * rng.normal(size=x.shape)
            error = np.asarray(jax.jit(jax.vmap(lambda y, sigma=sigma: made(y, sigma)))(jnp.asarray(y))) - x
            for other in (np.ones_like(y), y, np.roll(y, 1, -1), np.tanh(3 * y)):
                product = (error * other).mean(-1)
                assert abs(product.mean()) < 5 * product.std() / np.sqrt(len(y))
    assert not np.array_equal(made.centres, mixture(kind, 4).centres)


def test_the_truth_is_the_flow_that_a_fine_table_follows():
    sde = gddim.CLD()
    with jax.enable_x64(True):
        made = problem(sde, "few", [0, 1], samples=8)
        model = gddim.through(sde, jax.tree.map(lambda x: x[1], made.mixtures))
        fine = gddim.power_grid(1.0, 1e-3, 400)
        ends = jax.vmap(lambda u: gddim.sample(gddim.GDDIM(4, interpolate="data"), sde, model, u, fine))(made.start[1])
        np.testing.assert_allclose(ends[:, 0], made.end[1], atol=1e-4)


def test_the_command_measures_and_draws(tmp_path, capsys):
    arguments = ["--processes", "vp", "--mixtures", "2", "--samples", "8", "--nfe", "4", "8"]
    arguments += ["--samplers", "gddim:3:data", "unipc:2", "--grids", "power:2", "band", "--out", str(tmp_path / "out")]
    main(arguments)
    told = capsys.readouterr().out
    assert "| vp, median | 4 calls | 8 calls |" in told
    assert "| gddim:3:data on power:2 | 1.00 | 1.00 |" in told
    cells = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 2 * 2 * 2
    assert all(0 < m <= 10 * r for c in cells for m, r in zip(c["median"], c["rms"], strict=True))
    assert (tmp_path / "out" / "errors.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "is not overwritten" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("fields", [1, 2])
def test_learned_times_have_smaller_errors_on_mixtures_that_they_were_not_learned_on(fields):
    """Than a band as wide; at every number of steps, the geometric mean of medians over one mixture of each kind."""
    sde = {1: gddim.VP(), 2: gddim.CLD()}[fields]
    sampler = gddim.GDDIM(3, interpolate="data", corrector="free")
    with jax.enable_x64(True):
        problems = [problem(sde, kind, [31, 32], 32) for kind in KINDS]

        def error(grid):
            solver = sharing(sampler.solver(sde, grid))
            return np.exp(np.mean(np.log(typical(solver, problems)[0])))

        for steps in (8, 9, 10, 15):
            band = gddim.band_grid(sde, 1.0, T_MIN, steps, DATA_STD, *BAND)
            assert error(gddim.tuned_grid(sde, 1.0, T_MIN, steps, DATA_STD)) < 0.9 * error(band), steps


@pytest.mark.slow
def test_times_are_tuned_by_a_command(capsys):
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        tune.main(["--nfe", "5", "--mixtures", "2", "--samples", "8", "--steps", "8"])
    said = capsys.readouterr().out
    shares = [float(word) for word in said.splitlines()[0].removeprefix("5: ").split(", ")]
    assert len(shares) == 4
    assert np.all(np.diff([0, *shares, 1]) > 0)
    assert 0.5 < float(said.split("rms: ")[1].split()[0]) < 1.1  # of what a few mixtures say
    with pytest.raises(SystemExit):
        tune.main(["--mixtures", "0"])
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--samplers", "em:lam=1"], "adds noise"), (["--samplers", "repaint:4:lam=0"], "adds noise"),
     (["--samplers", "rk45"], "chooses its own steps"), (["--grids", "cosine"], "unknown grid"),
     (["--processes", "abc"], "no process 'abc'"), (["--nfe", "0"], "at least 1")],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_work(arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_on_images_samplers_are_measured_by_a_command(capsys, tmp_path, monkeypatch):
    records = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    monkeypatch.setattr(images.CIFAR10, "train", lambda self: records)
    own = [
        "--images",
        "20",
        "--size",
        "4",
        "--channels",
        "1",
        "--noises",
        "4",
        "--nfe",
        "2",
        "--processes",
        "vp",
        "cld",
    ]
    images.main([*own, "--samplers", "gddim:1:data", "gddim:3:data@uniform"])
    said = capsys.readouterr().out
    assert "exact denoiser, (4, 4, 1), data_scale 0.5, 4 noises" in said
    assert said.count("`gddim:1:data`") == 2
    images.main([*own, "--nfe", str(images.TRUTH_CALLS), "--samplers", images.TRUTH])
    assert f"| `{images.TRUTH}` | 0.0000 0.0000 |" in capsys.readouterr().out


def test_images_are_made_smaller_and_larger():
    data = np.random.default_rng(0).normal(size=(3, 32, 32, 3))
    for size in (8, 32, 64):
        made = images.resized(data, size, 3)
        assert made.shape == (3, size, size, 3)
        np.testing.assert_allclose(made.mean((1, 2)), data.mean((1, 2)))
    np.testing.assert_allclose(images.resized(data, 32, 1), data.mean(-1, keepdims=True))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processes", "nope"], "no process 'nope'; accepted: vp"),
        (["--nfe", "0"], "--images, --noises and --nfe must be at least 1"),
        (["--samplers", "nope"], "unknown sampler 'nope'"),
        (["--samplers", "em:lam=1"], "adds noise"),
        (["--model", "nowhere"], "nowhere"),
        (["--root", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_on_images_is_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        images.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
