"""Laws of tables that learn: never worse where no gradient looked, exact on Gaussian data, the same from a file to the bit."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import status_of
from etils import epath
from runs import COLOUR, LabelledColours, make_run

import gddim
from gddim import GDDIM, export
from gddim.errors import UserError
from gddim.experiment.cli import execute, parse
from gddim.experiment.fitting import fitted_by
from gddim.experiment.verbs.fit import APART
from gddim.samplers import Method, OnGrid
from gddim.samplers.fit import Family, Pairs, deviations, distance, fit, shortest, spectrum
from gddim.samplers.grids import Band
from gddim.samplers.learned import decode, encode
from gddim.samplers.numbered import sample_numbered, start
from gddim.samplers.solver import TableSolver
from gddim.samplers.words import BEST, parse_sampler, sampler_name, steps_for
from gddim.sde.words import process_name

COLOURS = (4, 4, 3)
DATA = GDDIM(3, corrector="free", interpolate="data")
PROCESSES = [gddim.VP(), gddim.CLD()]


class Images:
    """The denoiser of colour images that are one of four and a little noise."""

    def __init__(self, std: float = 0.1):
        self.std, self.centres = std, jax.random.normal(jax.random.key(7), (4, *COLOURS)) / 2

    def __call__(self, y, sigma):
        gaps = y[None] - self.centres
        noise = self.std**2 + sigma**2
        share = jax.nn.softmax(-(gaps**2).sum((1, 2, 3)) / (2 * noise))
        return (self.std**2 * y + sigma**2 * jnp.tensordot(share, self.centres, 1)) / noise


def gaussian(y, sigma):
    """Of data N(0, 1/4)."""
    return y * (0.25 / (0.25 + sigma**2))


def problem(sde, denoise, steps, sampler=DATA, count=64):
    """A fit's arguments, of pairs from a run of 24 calls; and others that it does not see."""
    model, key = gddim.through(sde, denoise), jax.random.key(np.uint32(APART))
    times = lambda n: OnGrid(DATA, BEST.grid).times(sde, gddim.power_grid(1.0, 1e-3, n))
    teacher, numbers = TableSolver.of(DATA.coefficients(sde, times(24)), sde), jnp.arange(3 * count)
    found = sample_numbered(model, teacher, COLOURS, key, numbers, path=True)
    assert found.path is not None
    starts = jax.vmap(lambda i: start(sde, COLOURS, key, i)[0])(numbers)
    train, held, fresh = (Pairs(starts[i::3], found.data[i::3]) for i in range(3))
    family = Family(sampler, sde, 1.0, 1e-3, Band.of(0.5, 0.06, 6.0))
    path = times(24), np.asarray(found.path.foreseen[..., 0, :])
    return (model, family, times(steps), path, train, held), fresh


@pytest.mark.parametrize("sde", PROCESSES, ids=process_name)
def test_a_fit_is_never_worse_where_no_gradient_looked(sde):
    arguments, fresh = problem(sde, Images(), steps=3)
    found = fit(*arguments, steps=50, batch=32)
    assert found.fitted < 0.8 * found.default
    assert found.fitted <= found.grid <= found.default
    model, _, grid, _, train, _ = arguments
    unit = spectrum(np.asarray(train.end))
    before, after = (
        float(distance(model, TableSolver.of(table, sde), fresh, unit))
        for table in (DATA.coefficients(sde, grid), found.table)
    )
    assert after < 0.9 * before


def test_what_is_best_already_is_kept():
    """Where the aim is the sampler's own end, nothing is better."""
    (model, family, grid, path, *_), fresh = problem(gddim.VP(), Images(), steps=2, count=16)
    solver = DATA.solver(gddim.VP(), grid)
    own = Pairs(fresh.start, jax.vmap(lambda u: gddim.VP().project(solver(model, u).state))(fresh.start))
    found = fit(model, family, grid, path, own, own, steps=25, batch=16)
    assert found.default < 1e-10
    assert found.fitted <= found.default


@pytest.mark.parametrize("sde", PROCESSES, ids=process_name)
def test_a_fit_is_exact_on_gaussian_data(sde):
    arguments, _ = problem(sde, gaussian, steps=2)
    found = fit(*arguments, steps=800, batch=32)
    assert found.default > 1e-3
    assert found.fitted < 0.01 * found.default
    residual = GDDIM(2, interpolate="residual")
    arguments, _ = problem(sde, gaussian, steps=2, sampler=residual, count=16)
    assert fit(*arguments, steps=0).fitted < 1e-5  # it is already, but for the teacher's error


def test_a_path_of_points_deviates_nowhere_and_the_shortest_way_is_the_shortest():
    sde, rng = gddim.CLD(), np.random.default_rng(0)
    times = gddim.power_grid(1.0, 1e-3, 8)
    point = np.broadcast_to(rng.normal(size=(3, *COLOURS)), (8, 3, *COLOURS))
    assert np.abs(deviations(sde, times, point)).max() < 1e-9
    cost = rng.uniform(size=(8, 8))
    ways = [(0, *between, 7) for between in itertools.combinations(range(1, 7), 3)]
    length = lambda way: sum(cost[i, j] for i, j in itertools.pairwise(way))
    assert tuple(shortest(cost, 4)) == min(ways, key=length)


@pytest.mark.parametrize("sampler", [DATA, GDDIM(2, interpolate="residual"), gddim.UniPC(2)], ids=sampler_name)
@pytest.mark.parametrize("sde", PROCESSES, ids=process_name)
def test_what_is_corrected_is_the_same_table_in_another_form(sde, sampler):
    """By the data and by ε alone, to rounding in float64; and it moves with its times as its slopes say."""
    grid = gddim.power_grid(1.0, 1e-3, 4)
    family = Family(sampler, sde, 1.0, 1e-3, Band.of(0.5, 0.06, 6.0))
    np.testing.assert_allclose(family.times(family.gaps(grid)), grid, rtol=1e-9)
    slopes, h = family.slopes(family.gaps(grid)), 1e-3 * np.array([1.0, -2.0, 0.0, 3.0])
    moved, table = family.table(family.times(family.gaps(grid) + h)), family.table(grid)
    ahead = table.weights + np.tensordot(h, slopes.weights, 1)
    assert np.abs(moved.weights - ahead).max() < 0.02 * np.abs(moved.weights - table.weights).max()
    with jax.enable_x64(True):
        model = gddim.through(sde, Images())
        u = sde.sample_prior(jax.random.key(0), (*COLOURS[:2], sde.k, 3)).astype(jnp.float64)
        for eps_fn in (model, lambda u, t: model(u, t)):
            ends = [TableSolver.of(each, sde)(eps_fn, u).state for each in (sampler.coefficients(sde, grid), table)]
            np.testing.assert_allclose(ends[1], ends[0], rtol=1e-6, atol=1e-7)


def test_a_table_is_the_same_from_a_file_to_the_bit_and_of_its_process_alone(tmp_path):
    sde, grid = gddim.CLD(), gddim.band_grid(gddim.CLD(), 1.0, 1e-3, 3)
    table = Family(DATA, sde, 1.0, 1e-3, Band.of(0.5, 0.06, 6.0)).table(grid)
    file = tmp_path / "My Table@3.npz"
    file.write_bytes(encode(table, {"process": "cld", "network": "abc", "nfe": 3}))
    sampler = gddim.load_table(file)
    for name, value in vars(table).items():
        found = getattr(sampler.stored.table, name)
        assert (found is None) == (value is None), name
        assert value is None or (found.dtype == value.dtype and found.tobytes() == value.tobytes()), name
    assert parse_sampler(f"table:{file}") == sampler == parse_sampler(sampler_name(sampler))
    assert gddim.load_table("My Table@3", tmp_path).stored == sampler.stored
    u = sde.sample_prior(jax.random.key(1), (*COLOURS[:2], 2, 3))
    model = gddim.through(sde, Images())
    ours = gddim.sample(sampler, sde, model, u, [1.0, 1e-3])
    np.testing.assert_array_equal(ours, TableSolver.of(table, sde)(model, u).state)
    assert Method(sampler, 3).solver(sde)(model, u).calls == 3
    with pytest.raises(ValueError, match="fitted for cld, not for vp"):
        sampler.solver(gddim.VP(), [1.0, 1e-3])
    with pytest.raises(ValueError, match=r"ends at t_min 0\.001, not at 0\.01"):
        sampler.solver(sde, [1.0, 1e-2])
    with pytest.raises(ValueError, match=r"starts at 1, not at 0\.05"):
        sampler.solver(sde, [0.05, 1e-3])
    for nfe, says in ((4, "makes 3 calls, no more"), (2, "at least 3")):
        with pytest.raises(UserError, match=says):
            steps_for(sampler, nfe)
    with pytest.raises(UserError, match="a table is whole as it is"):
        parse_sampler(f"afs:table:{file}")
    assert "abc, and this is def" in sampler.foreign("def")
    assert not sampler.foreign("abc")
    assert not sampler.foreign("def", rounded_from="abc")
    for content in (b"no table", file.read_bytes()[:-100]):
        with pytest.raises(UserError, match="no table that fit wrote"):
            decode(content, "x")
    with pytest.raises(UserError, match="No such file"):
        parse_sampler("table:nowhere.npz")


FIT = ["--sampling.nfe=2", "--fit.steps=25", "--fit.pairs=16", "--fit.held-out=16", "--fit.batch=16", "--fit.teacher=8"]


@pytest.mark.slow
def test_a_table_is_fitted_to_a_network_of_classes(tmp_path):
    labelled = dataclasses.replace(COLOUR, data=LabelledColours(3))
    run = make_run(tmp_path / "w", labelled)
    execute(parse(labelled, ["fit", f"--workdir={run}", *FIT, "--fit.steps=1"]))
    assert gddim.load_table(run / "solvers" / "vp-2.npz").about["pairs"] == 16


@pytest.mark.slow
def test_a_table_is_used_wherever_samplers_are_named(tmp_path, capsys):
    run = make_run(tmp_path / "w")
    do = lambda *words: execute(parse(COLOUR, [words[0], f"--workdir={run}", *words[1:]]))
    do("fit", "--process=cld", *FIT)
    file = run / "solvers" / "cld-2.npz"
    table = gddim.load_table(file)
    assert table.about["process"] == "cld"
    assert table.about["loss"]["fitted"] <= table.about["loss"]["before"]
    with pytest.raises(UserError, match="is there, and is not overwritten"):
        do("fit", "--process=cld", *FIT)
    do("sample", "--process=cld", f"--sampler=table:{file}", "--sampling.nfe=2")
    with pytest.raises(UserError, match="makes 2 calls, no more"):
        do("sample", "--process=cld", f"--sampler=table:{file}", "--sampling.nfe=4")
    with pytest.raises(UserError, match="fitted for cld, not for vp"):
        do("sample", f"--sampler=table:{file}", "--sampling.nfe=2")
    cells = ["--eval.nfe", "2", "3", "--eval.processes", "own", "cld", "--eval.samples=8", "--eval.features=pixels"]
    do("evaluate", *cells, "--eval.samplers", f"table:{file}", "gddim:1")
    assert re.search(r"cld-2.npz \| cld \| \d", capsys.readouterr().out)
    with pytest.raises(UserError, match="no cell"):
        do("evaluate", "--eval.nfe", "3", "--eval.features=pixels", "--eval.samplers", f"table:{file}")

    out = tmp_path / "out"
    assert export.main([str(run), str(out / "a.safetensors"), f"--hub-layout={out / 'hub'}"]) == 0
    drawn = [gddim.load(each).sample(2, sampler="table:cld-2", process="cld") for each in (run, out / "a.safetensors")]
    drawn.append(gddim.load(out / "hub").sample(2, sampler="table:cld-2", process="cld"))
    for each in drawn[1:]:
        np.testing.assert_array_equal(each, drawn[0])
    with pytest.warns(UserWarning, match="fitted for the network"):
        gddim.load(run, step=1).sample(2, sampler=table, process="cld")


def test_a_process_without_a_word_has_a_file_of_its_own(tmp_path):
    names = set()
    for last in (0.02, 0.03):
        sde = gddim.VP.from_betas(np.linspace(1e-4, last, 1000))
        names.add(fitted_by(dataclasses.replace(COLOUR, sde=sde), epath.Path(tmp_path)).file.name)
    assert len(names) == 2
    assert all(len(name) < 50 for name in names)


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--sampler=em:lam=1"], "adds noise"), (["--sampler=gddim:2"], "interpolates no data"),
     (["--sampler=rk45"], "such as gddim:3:data:free@tuned"), (["--sampling.last=data"], "no last call"),
     (["--fit.teacher=4"], "must be more than"), (["--fit.name=a/b"], "is no file's name")],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused_before_the_work(words, says, tmp_path, capsys):
    run = make_run(tmp_path / "w", steps=(1,))
    assert status_of(COLOUR, "fit", f"--workdir={run}", *words) == 2
    assert says in capsys.readouterr().err
    assert not (run / "solvers").exists()
