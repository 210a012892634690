"""Guidance of a run: on the command line, in its table, by a loaded network; and what is refused of it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import refusal, status_of
from PIL import Image
from runs import COLOUR, Colours, LabelledColours, make_run

import gddim
from experiments import points
from gddim import generate
from gddim.data import to_uint8
from gddim.evaluation.sweep import FLOOR, read_rows
from gddim.experiment import Evaluation
from gddim.experiment.sampling import Guide
from gddim.guidance import Autoguidance, ClassifierFree, Guidance
from gddim.parallel import make_mesh


class Linear(eqx.Module):
    """A network of somebody's own, which compiles at once."""

    weight: jax.Array
    label: jax.Array

    def __call__(self, x, level, cond=None, *, key=None):
        label = -1 if cond is None else cond["label"]
        moved = jax.nn.one_hot(label, len(self.label), dtype=x.dtype) @ self.label
        return jnp.tanh(x @ self.weight + moved[None, None]) / (1 + level**2)


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    width: int = 3

    def build(self, in_shape, out_channels, key):
        weight = jax.random.normal(key, (self.width, in_shape[-1], out_channels)).sum(0)
        return Linear(weight, jnp.ones((self.width, out_channels)))


LABELLED = dataclasses.replace(
    COLOUR, net=LinearConfig(), data=LabelledColours(3), train=dataclasses.replace(COLOUR.train, label_dropout=0.1),
    eval=Evaluation(samples=8, batch=8, nfe=(4,), features="pixels", samplers=(gddim.GDDIM(2),)),
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "w", LABELLED)


def drawn(run: Path, *words: str) -> np.ndarray:
    assert status_of(LABELLED, "sample", f"--workdir={run}", *words) == 0
    with np.load(run / "samples.npz", allow_pickle=False) as file:
        return file["samples"].astype(int)


def test_samples_are_those_of_the_guided_denoiser_and_of_the_loaded_network(run, capsys):
    model = gddim.load(run, net=LinearConfig(), mesh=make_mesh())
    plain = drawn(run)
    np.testing.assert_array_equal(drawn(run, "--guide.scale=1"), plain)
    guided = drawn(run, "--guide.scale=3")
    assert "guided by scale 3: NFE 4 (8 network evaluations)" in capsys.readouterr().out
    assert np.abs(guided - plain).mean() > 3
    by_hand = model.sample(8, guide=lambda D: ClassifierFree(D, 3.0))
    for found in (model.sample(8, guide=3.0), by_hand):
        np.testing.assert_allclose(to_uint8(found).astype(int), guided, atol=1)
    unconditional = to_uint8(model.sample(8, classes=[-1] * 8)).astype(int)
    np.testing.assert_allclose(drawn(run, "--guide.scale=0"), unconditional, atol=1)
    worse = gddim.load(run, net=LinearConfig(), step=1, mesh=make_mesh())
    away = to_uint8(model.sample(8, guide=lambda D: Autoguidance(D, worse.denoiser, 3.0))).astype(int)
    np.testing.assert_allclose(drawn(run, "--guide.scale=3", "--guide.checkpoint=1"), away, atol=1)
    assert np.abs(away - guided).mean() > 3
    itself = drawn(run, "--guide.scale=3", "--guide.checkpoint=2")
    np.testing.assert_allclose(itself, plain, atol=1)
    told = {json.loads(str(np.load(each)["gddim"])).get("guide", {}).get("scale") for each in run.glob("samples-*.npz")}
    assert told >= {0.0, 3.0, None}, "what a file was drawn with stands in it"


def test_evaluations_are_counted_where_guidance_acts():
    sde, times = gddim.VP(), gddim.power_grid(1.0, 1e-3, 6)[:-1]
    sigma = np.sqrt(1 / np.asarray(sde.transition(times, 0.0)).ravel() ** 2 - 1)
    assert Guidance(1.0).evaluations(sde, 6, times) == 6
    assert Guidance(2.0).evaluations(sde, 6, times) == Guidance(2.0, (0.1, 1.0)).evaluations(sde, 6) == 12
    acting = Guidance(2.0, (float(sigma[4]) * 1.01, float(sigma[1]) * 1.01))
    assert acting.evaluations(sde, 6, times) == 6 + 3
    solver: Any = gddim.Method(gddim.GDDIM(3, corrector=True), 6).solver(sde)
    assert len(solver.times) == solver.nfe == 6


def test_guidance_costs_two_evaluations_and_nothing_else():
    model = dataclasses.replace(LABELLED, net=dataclasses.replace(COLOUR.net, width=16)).build(jax.random.key(0))
    y, label = jnp.ones((8, 8, 3)), {"label": jnp.int32(1)}

    def flops(denoise) -> float:
        return jax.jit(lambda y, label: denoise(y, 0.5, label)).lower(y, label).compile().cost_analysis()["flops"]

    assert flops(ClassifierFree(model.denoiser, 2.0)) < 2.05 * flops(model.denoiser)
    assert flops(Autoguidance(model.denoiser, model.denoiser, 2.0)) < 2.05 * flops(model.denoiser)
    assert flops(ClassifierFree(model.denoiser, 1.0)) < 1.01 * flops(model.denoiser)


def test_a_table_tells_guided_rows_apart(run):
    for words in ([], ["--guide.scale=2"], ["--guide.scale=2", "--guide.checkpoint=1"], ["--guide.scale=2"]):
        assert status_of(LABELLED, "evaluate", f"--workdir={run}", *words) == 0
    rows = [row for row in read_rows(run / "results.jsonl") if row["cell"]["sampler"] != FLOOR]
    told = [row["provenance"].get("guide") for row in rows]
    assert told == [None, "scale 2", "scale 2, away from step 1"]
    assert [row["measured"].get("evaluations") for row in rows] == [None, 8, 8]
    assert [row["measured"]["nfe"] for row in rows] == [4, 4, 4]
    assert len({row["metrics"]["frechet"] for row in rows}) == 3
    assert rows[2]["provenance"]["worse"] not in (None, rows[2]["provenance"]["checkpoint"])
    table = (run / "results.md").read_text()
    for heading in ("diffusion: 8 samples", "guided by scale 2: 8", "guided by scale 2, away from step 1: 8"):
        assert heading in table
    assert "Network evaluations a sample, two in a call that is guided: 8 at NFE 4." in table


def test_a_loaded_network_refuses_classes_that_it_does_not_know(run):
    model = gddim.load(run, net=LinearConfig())
    for classes, says in (
        ([0, 3], "given are 0 to 3, accepted are 0 to 2, and -1 for no class"), ([-2, 0], "given are -2 to 0"),
        ([0], r"given int64\[1\], accepted are whole numbers, one or 2"),
        ([0.5, 1.0], r"given float64\[2\], accepted are"),
    ):  # fmt: skip
        with pytest.raises(gddim.UserError, match=says):
            model.sample(2, classes=classes)
    under_jit = jax.jit(lambda classes: model.sample(2, classes=classes))(jnp.array([2, 0]))
    np.testing.assert_allclose(under_jit, model.sample(2, classes=[2, 0]), atol=1e-5)
    with pytest.raises(ValueError, match="scale=nan must be a finite number"):
        model.sample(2, guide=float("nan"))


def test_a_worse_network_that_is_not_loaded_guides_nothing(run):
    model = gddim.load(run, net=LinearConfig())
    model = dataclasses.replace(model, settings=dataclasses.replace(model.settings, guide=Guide(2.0, checkpoint=1)))
    with pytest.raises(gddim.UserError, match="the run's is scale 2, away from step 1, by a worse network"):
        model.sample(2)
    assert isinstance(model.through(guide=1)[0], gddim.Denoiser)


def test_pictures_by_seed_are_of_the_classes_asked_and_guided(tmp_path, capsys):
    run = make_run(tmp_path / "run", dataclasses.replace(LABELLED, net=COLOUR.net))
    asked = [str(run), str(tmp_path / "of"), "--seeds=0-3", "--nfe=3", "--batch=4", "--classes"]
    assert generate.main([*asked, "2", "0"]) == 0
    model = gddim.load(run, mesh=make_mesh())
    of = [model.sample(1, nfe=3, classes=[k], key=jax.random.key(seed))[0] for seed, k in enumerate((2, 0, 2, 0))]
    for seed in range(4):
        with Image.open(tmp_path / "of" / f"{seed:06d}.png") as image:
            np.testing.assert_allclose(np.asarray(image).astype(int), to_uint8(of[seed]).astype(int), atol=1)
            assert json.loads(image.text["gddim"])["class"] == (2, 0)[seed % 2]
    asked[1] = str(tmp_path / "none")
    assert generate.main([*asked, "3"]) == 2
    assert "classes 3: accepted are 0 to 2, and -1 for no class" in capsys.readouterr().err
    words = ["--seeds=4-5", "--nfe=3", "--guide.scale=3"]
    assert generate.main([str(run), str(tmp_path / "a"), *words]) == 0
    assert (
        generate.main([str(run), str(tmp_path / "b"), *words, "--guide.checkpoint=1", "--guide.interval", "0.1", "9"])
        == 0
    )
    assert generate.main([str(run), str(tmp_path / "c"), *words, "--guide.checkpoint=0"]) == 2
    assert "no whole checkpoint of step 0" in capsys.readouterr().err
    model, worse = (gddim.load(run, step=step, mesh=make_mesh()) for step in (2, 1))
    seeds = jnp.asarray(np.resize([4, 5], 16), jnp.uint32)
    away = lambda D: Autoguidance(D, worse.denoiser, 3.0, (0.1, 9.0))
    for folder, guide in (("a", 3.0), ("b", away)):
        found = jax.jit(lambda seeds, guide=guide: to_uint8(model.sample_seeds(seeds, nfe=3, guide=guide)))(seeds)
        with Image.open(tmp_path / folder / "000005.png") as image:
            np.testing.assert_allclose(np.asarray(image).astype(int), found[1].astype(int), atol=1)
            assert json.loads(image.text["gddim"])["guide"].startswith("scale 3")
    sampling = dataclasses.replace(LABELLED.sampling, guide=Guide(2.0, (0.1, 9.0)))
    run = make_run(tmp_path / "own", dataclasses.replace(LABELLED, net=COLOUR.net, sampling=sampling))
    assert generate.main([str(run), str(tmp_path / "c"), *words]) == 0
    with Image.open(tmp_path / "c" / "000005.png") as image:
        assert json.loads(image.text["gddim"])["guide"] == str(Guide(3.0, (0.1, 9.0))), "the interval is the run's"
    assert generate.main([str(run), str(tmp_path / "d"), "--seeds=4", "--nfe=3", "--guide.scale=1"]) == 0
    with Image.open(tmp_path / "d" / "000004.png") as image:
        assert "guide" not in json.loads(image.text["gddim"]), "none, and the run's interval is of none"


WORDS = [
    *("--train.steps=8", "--train.batch=16", "--train.warmup=1", "--net.width=16", "--net.depth=1"),
    *("--data.train-points=200", "--data.test-points=100", "--sampling.batch=8", "--sampling.nfe=3", "--sampling.samples=8"),
    *("--eval.samples=50", "--eval.batch=50", "--eval.nfe=3", "--eval.samplers=gddim:2", "--data.labels"),
    *("--train.ema-profiles", "0.05", "0.1", "--train.snapshot-every=2", "--train.save-every=4"),
]  # fmt: skip


def test_a_run_remembers_its_guide_and_another_average_may_be_it(tmp_path, capsys):
    do = lambda *words: status_of(points.EXPERIMENT, *words, f"--workdir={tmp_path / 'w'}")
    assert do("run", *WORDS, "--guide.scale=2") == 0
    assert "warning: guide.scale 2: the network was trained without label dropout" in capsys.readouterr().err
    (row,) = (row for row in read_rows(tmp_path / "w" / "results.jsonl") if row["cell"]["sampler"] != FLOOR)
    assert row["provenance"]["guide"] == "scale 2"
    model = gddim.load(tmp_path / "w")
    assert model.settings.guide == Guide(2.0)
    with pytest.warns(UserWarning, match="lose what makes them likely"):
        model.sample(2)
    assert do("sample", "--guide.ema=0.2") == 0
    assert "guided by scale 2, away from σ_rel 0.2: NFE 3 (6 network evaluations)" in capsys.readouterr().out
    for verb in ("likelihood", "encode"):
        assert do(verb) == 2
        assert (
            capsys.readouterr().err == f"error: guide.scale 2: {verb} is of the network alone: give --guide.scale 1\n"
        )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--guide.scale=-1"], "guide.scale must be at least 0, not -1"),
        (["--guide.scale=2", "--guide.interval", "5"], "guide.interval 5: accepted are two numbers, 0 <= LOW < HIGH"),
        (["--guide.scale=2", "--guide.interval", "5", "1"], "guide.interval 5 1: accepted are two numbers"),
        (["--guide.checkpoint=1"], "guide.checkpoint needs a guide.scale other than 1, as 2"),
        (["--guide.scale=2", "--guide.checkpoint=7"], "--guide.checkpoint 7: the run has checkpoints [1, 2]"),
        (["--guide.scale=2", "--guide.ema=0.1"], "--guide.ema is made of snapshots, and"),
        (["--guide.scale=2", "--guide.ema=9"], "guide.ema must lie in [0, 0.2"),
        (["--guide.scale=two"], "--guide.scale two: accepted is a number"),
        (["--guide.weight=2"], "unknown option --guide.weight"),
    ],
)  # fmt: skip
def test_what_cannot_guide_is_one_line(words, says, run, capsys):
    for verb in ("sample", "evaluate"):
        assert says in refusal(LABELLED, run, capsys, verb, *words)


def test_networks_that_cannot_be_guided_and_checkpoints_of_others_are_one_line(run, tmp_path, capsys):
    says = lambda experiment, *words: (status_of(experiment, *words), capsys.readouterr().err)
    plain = make_run(tmp_path / "plain")
    status, said = says(COLOUR, "sample", f"--workdir={plain}", "--guide.scale=2")
    assert (status, said) == (2, ("error: guide.scale 2: this run knows no classes; train one with --data.labels, or give "
                                 "--guide.checkpoint\n"))  # fmt: skip
    assert says(COLOUR, "sample", f"--workdir={plain}", "--guide.scale=2", "--guide.checkpoint=1")[0] == 0
    status, said = says(COLOUR, "evaluate", f"--workdir={plain}", "--eval.balance=data", "--eval.features=pixels")
    assert (status, said) == (2, "error: eval.balance data: this run knows no classes; train one with --data.labels\n")
    with pytest.raises(gddim.UserError, match="guide 2: this run knows no classes"):
        gddim.load(plain).sample(2, guide=2)
    assert generate.main([str(plain), str(tmp_path / "out"), "--guide.scale=2"]) == 2
    assert "guide 2: this run knows no classes" in capsys.readouterr().err

    wide = dataclasses.replace(LABELLED, net=LinearConfig(4))
    other = make_run(tmp_path / "wide", wide, steps=(3,))
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    shutil.copytree(other / "checkpoints" / "3", mixed / "checkpoints" / "3")
    status, said = says(LABELLED, "sample", f"--workdir={mixed}", "--step=2", "--guide.scale=2", "--guide.checkpoint=3")
    assert status == 2
    assert "guide, scale 2, away from step 3" in said
    assert "is of another model" in said
    assert said.count("\n") == 1

    for words in (["train", "--guide.scale=2", "--guide.checkpoint=1"], ["run", "--guide.scale=2", "--guide.ema=0.1"]):
        status, said = says(LABELLED, *words, f"--workdir={tmp_path / 'new'}", "--train.show-every=1")
        assert (status, "is for what follows training" in said) == (2, True)
    eps = dataclasses.replace(LABELLED, sde=gddim.CLD(), data=Colours()).predicting_eps()
    eps = dataclasses.replace(eps, train=dataclasses.replace(eps.train, label_dropout=0.0))
    fields = make_run(tmp_path / "eps", eps)
    status, said = says(eps, "sample", f"--workdir={fields}", "--guide.scale=2", "--guide.checkpoint=1")
    assert (status, "this network predicts the ε of cld" in said) == (2, True)
