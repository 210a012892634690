"""One network, every process: a run is sampled, measured and looked at through others than the one it was trained with."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import status_of
from etils import epath
from test_verbs import POINTS, do

import gddim
from experiments import cld_digits, points, points_vp
from gddim.errors import UserError
from gddim.evaluation.report import chart, groups
from gddim.evaluation.sweep import read_rows
from gddim.experiment import Evaluation, Model, Training
from gddim.experiment.checkpoints import restore_ema
from gddim.experiment.cli import parse
from gddim.experiment.drawing import follow
from gddim.experiment.pictures import film, pixels, trajectory
from gddim.experiment.plan import Plan
from gddim.guidance import Guidance
from gddim.loss import ScoreMatching
from gddim.model import seen_through
from gddim.samplers.numbered import sample_numbered
from gddim.sde.words import parse_process

THIRD = "experiments.processes:third_order_langevin"
EVERY = ("vp", "cosine", "subvp", "ve", "flow", "cld:gamma=0.1", "psld", THIRD)
RUN = points.EXPERIMENT


def quick(*words: str) -> list:
    """All of `EVERY`, these in every run of the tests: each compiles for seconds."""
    return [pytest.param(word, marks=[] if word in words else pytest.mark.slow) for word in EVERY]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "w"
    do(RUN, workdir, "train")
    return workdir


def restored(workdir: Path) -> gddim.Denoiser:
    plan = Plan(parse(RUN, ["sample", *POINTS]).experiment)
    return plan.model(restore_ema(plan, epath.Path(workdir))[0])


def samples_in(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        return file["samples"]


@pytest.mark.parametrize("word", quick("ve", THIRD))
def test_samples_through_a_process_are_those_of_the_same_denoiser_in_code(word: str, trained: Path, capsys):
    do(RUN, trained, "sample", f"--process={word}", "--sampler=gddim:3:data")
    assert f"through {word}: NFE 3" in capsys.readouterr().out
    sde, model = parse_process(word), restored(trained)
    eps_fn = gddim.through(sde, model.denoiser)
    ts = gddim.power_grid(sde.horizon, *((0.002, 3, 7) if word == "ve" else (1e-3 * sde.horizon, 3)))

    def draw(i):
        prior, noise = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        u = sde.sample_prior(prior, (sde.k, 2))
        return sde.project(gddim.sample(gddim.GDDIM(3, interpolate="data"), sde, eps_fn, u, ts, noise))

    np.testing.assert_allclose(samples_in(trained / "samples.npz"), jax.vmap(draw)(jnp.arange(8)), atol=3e-3)


@pytest.mark.parametrize(("word", "channels"), [*((word, 3) for word in EVERY), ("psld", 1)])
def test_images_through_a_process_are_those_of_the_same_denoiser(word: str, channels: int):
    net = lambda x, level, cond=None, *, key=None: jnp.tanh(x) + level
    model, sde = gddim.Denoiser(gddim.CLD(), net, data_std=0.5), parse_process(word)
    solver = gddim.Method(gddim.GDDIM(2, lam=0.3, interpolate="data"), 4).solver(sde)
    both = seen_through(model, sde), gddim.through(sde, model.denoiser)
    swapped, direct = (
        sample_numbered(each, solver, (4, 4, channels), jnp.asarray(3), jnp.arange(2)).data for each in both
    )
    assert swapped.shape == (2, 4, 4, channels)
    np.testing.assert_allclose(swapped, direct, atol=1e-4)


def test_a_table_is_of_processes_samplers_noise_and_calls_and_the_runs_own_cells_stay(trained: Path, capsys):
    do(RUN, trained, "evaluate")
    before = read_rows(trained / "results.jsonl")
    assert {row["cell"]["process"] for row in before if row["cell"]["sampler"] != "data"} == {"cld"}
    asked = ("cld", "vp", THIRD)
    samplers = ("gddim:1:lam=0.3:data", "em")
    do(RUN, trained, "evaluate", "--eval.processes", *asked, "--eval.samplers", *samplers, "--eval.nfe", "3", "4")
    capsys.readouterr()
    rows = read_rows(trained / "results.jsonl")
    assert rows[: len(before)] == before, "the cell of cld by em at 3 calls is known"
    cells = {(row["cell"]["process"], row["cell"]["sampler"], row["cell"]["nfe"]) for row in rows[len(before) :]}
    assert cells == {(p, s, n) for p in asked for s in samplers for n in (3, 4)} - {("cld", "em", 3)}
    assert all(np.isfinite(row["metrics"]["frechet"]) for row in rows)
    by_euler = [row["metrics"]["frechet"] for row in rows if (row["cell"]["sampler"], row["cell"]["nfe"]) == ("em", 4)]
    assert len(set(by_euler)) == 3, "each is drawn through its own"
    assert len({row["provenance"]["process"] for row in rows}) == 3
    text = (trained / "results.md").read_text()
    assert text.count("## ") == 1, "one table"
    assert all(f"| em | {each} |" in text for each in asked)
    assert "| FiveRings, training (floor) |  |" in text
    found = groups(rows)
    lines = {line.get_label(): line.get_linestyle() for line in chart(rows).axes[0].get_lines()}
    styles = [lines[f"Euler, {each}"] for each in ("cld", "vp", "third_order_langevin")]
    assert len(found) == 1
    assert len(set(styles)) == 3
    assert found[0].heading.endswith(", variance-preserving diffusion and third order langevin")
    do(RUN, trained, "evaluate", "--eval.processes", "own", "--process", "vp")
    assert read_rows(trained / "results.jsonl") == rows, "own is cld, which is known"
    do(RUN, trained, "evaluate", "--process", "vp", "--eval.samplers", "em", "--eval.nfe", "4")
    assert read_rows(trained / "results.jsonl") == rows, "without --eval.processes it is that of --process"


def test_every_word_is_sampled_and_told_by_name(trained: Path, capsys):
    words = ["--process", "cld:gamma=0.10", "--eval.processes", "own", THIRD, "gddim:CLD"]
    do(RUN, trained, "sample", *words, "--dry-run")
    said = capsys.readouterr().out
    assert '\nprocess = "cld:gamma=0.1"\n' in said
    assert f'\neval.processes = ["own", "{THIRD}", "cld"]\n' in said


@pytest.mark.parametrize("word", quick("flow", THIRD))
def test_latents_and_likelihood_are_those_of_the_process(word: str, trained: Path, capsys):
    sde = parse_process(word)
    do(RUN, trained, "encode", f"--process={word}", "--sampling.nfe=40")
    latents = samples_in(trained / "latents.npz")
    assert latents.shape == (8, sde.k, 2)
    assert np.isfinite(latents).all()
    spread = latents.std(axis=(0, 2)) / np.sqrt(np.diag(sde.prior_covariance(sde.horizon)))
    assert ((spread > 0.2) & (spread < 3)).all(), spread
    do(RUN, trained, "likelihood", f"--process={word}")
    found = json.loads((trained / "likelihood.json").read_text())
    assert found["process"] == word
    assert found["kind"] == ("exact" if sde.k == 1 else "upper bound")
    assert abs(found["bits_per_dimension"]) < 20


@pytest.mark.parametrize("word", quick("ve", "flow", THIRD))
def test_pictures_of_a_way_show_every_process_at_the_size_of_the_data(word: str, trained: Path):
    model = restored(trained)
    experiment = parse(RUN, ["sample", *POINTS, f"--process={word}"]).experiment
    sde = parse_process(word)
    ts = experiment.sampling.flow_grid(sde, experiment.data.shape, 64)
    paths = follow(experiment, model, experiment.sampling, Guidance(), 50, ts)
    for part in paths:
        assert np.isfinite(part).all()
    assert np.abs(paths.data).max() < 8, "also where the noise is 80"
    for figure in (trajectory(sde, paths, "run"), film(paths, "run")):
        assert pixels(figure).std() > 0


def test_a_network_of_frequencies_is_drawn_through_its_own_process_alone():
    own = dataclasses.replace(cld_digits.EXPERIMENT, sde=gddim.Blurring(8), train=Training(), eval=Evaluation())
    assert own.through(None) == own.through(gddim.Blurring(8)) == own.sde
    with pytest.raises(UserError, match=r"process vp: Blurring.* has coefficients by position or frequency"):
        own.through(gddim.VP())


def test_ways_of_a_process_by_frequency_are_drawn_to_their_size():
    own = dataclasses.replace(cld_digits.EXPERIMENT, sde=gddim.Blurring(8), train=Training(), eval=Evaluation())
    model = gddim.Denoiser(own.sde, lambda x, level, cond=None, *, key=None: 0 * x)
    paths = follow(own, model, own.sampling, Guidance(), 2, gddim.power_grid(1.0, 1e-3, 4))
    assert paths.data.shape == paths.foreseen.shape == (4, 2, 8, 8, 1)
    assert 0.2 < float(paths.data[0].std()) < 2


def test_an_epsilon_of_one_field_is_drawn_through_every_process():
    own = dataclasses.replace(points_vp.EXPERIMENT, model=Model("eps"))
    assert own.through(gddim.CLD()) == gddim.CLD()
    with pytest.raises(UserError, match="no other process has: only --process own is drawn here; a run with"):
        dataclasses.replace(RUN, model=Model("velocity")).through(gddim.VP())


@pytest.mark.parametrize("words", [["--model.predicts", "eps"], ["--model.predicts=eps"]], ids=" ".join)
def test_the_main_job_trains_the_published_eps_by_one_option(words):
    """White noise and other processes, which its file sets, are of a prediction of data."""
    found = parse(cld_digits.EXPERIMENT, ["run", *words]).experiment
    assert found.objective == ScoreMatching(found.sde, 1.0)
    assert found.evaluated() == [gddim.CLD()]
    assert found.train.steps == cld_digits.EXPERIMENT.train.steps


REFUSED = [
    (["sample", "--process", "nonsense"], "unknown process 'nonsense'; accepted are vp, cosine"),
    (["evaluate", "--eval.processes", "vp", "cld:gama=1"], "'gama=1' is no parameter"),
    (["sample", "--process", "vp", "--model.predicts", "eps"], "predicts the ε of cld in its R coordinates"),
    (["evaluate", "--eval.processes", "own", "vp", "--model.predicts", "eps"], "predicts the ε of cld"),
    (["encode", "--process", "vp", "--model.predicts", "eps", "--sampler", "gddim:2"], "predicts the ε of cld"),
    (["likelihood", "--process", "vp", "--model.predicts", "eps"], "predicts the ε of cld"),
    (["run", "--eval.processes", "own", "vp", "--model.predicts", "eps"], "predicts the ε of cld"),
    (["train", "--train.show-every", "4", "--process", "vp", "--model.predicts", "eps"], "predicts the ε of cld"),
    (["sample", "--process", "experiments.processes:blurred_langevin_8"], "belongs to such a process"),
    (
        ["run", "--eval.processes", "cld", "flow", "--eval.samplers", "em"],
        "error: flow: em cannot start at 1, where nothing",
    ),
    (
        ["run", "--eval.processes", "cld", "flow", "--eval.samplers", "sscs"],
        "error: flow: SSCS needs a stationary covariance",
    ),
    (["sample", "--process", "ve", "--sampling.t-min", "90"], "t_min must be below the horizon 80.0"),
    (["evaluate", "--eval.processes", "vp,cld"], "separate by spaces: --eval.processes vp cld"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED)
def test_what_a_network_cannot_serve_is_refused_in_a_line_before_anything_is_done(words, says, tmp_path, capsys):
    assert status_of(RUN, words[0], f"--workdir={tmp_path / 'w'}", *POINTS, *words[1:]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "w").exists()
