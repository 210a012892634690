"""The verb `restore`, on a network whose data are known: numbers N(0, s²), each by itself."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import refusal, status_of
from PIL import Image
from runs import WHITE, Colours, LabelledColours, make_run

import gddim
from experiments import cld_digits, points
from gddim.experiment.restoration import Restoration
from gddim.samplers.learned import encode


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "w", WHITE)


def restored(run: Path, task: str, *words: str) -> tuple[np.ndarray, dict]:
    given = ["restore", f"--workdir={run}", "--task", task, "--restore.images=2", "--restore.samples=8", *words]
    assert status_of(WHITE, *given) == 0
    name = f"restored-{task.replace(':', '-')}"
    with np.load(run / f"{name}.npz", allow_pickle=False) as file:
        assert file["samples"].shape == (2, 8, 8, 8, 3)
        samples = file["samples"] / 127.5 - 1
    with Image.open(run / f"{name}.png") as image:
        assert image.size[0] > 10 * 8
    return samples, json.loads((run / f"{name}.json").read_text())


TRUTH = Colours().train()[np.arange(2)] / 127.5 - 1


@pytest.mark.parametrize("words", [[], ["--process=cld", "--restore.by=pseudoinverse"]], ids=["vp", "cld"])
def test_what_was_seen_is_there_and_what_was_not_is_of_the_data(words, run, capsys):
    samples, report = restored(run, "inpaint", *words)
    np.testing.assert_allclose(
        samples[:, :, :4], np.broadcast_to(TRUTH[:, None, :4], samples[:, :, :4].shape), atol=0.1
    )
    assert abs(samples[:, :, 4:].mean()) < 0.1
    assert 0.35 < samples[:, :, 4:].std() < 0.6, "s, of what is clipped"
    mean = report["mean"]
    assert len(report["each"]) == 2
    assert mean["misfit"] < 0.05
    assert mean["psnr"] < mean["psnr_of_mean"] == pytest.approx(mean["psnr_measured"], abs=0.7)
    assert mean["psnr_nearest"] == 100, "these records are trained on, too"
    assert report["gddim"]["restore"]["task"] == "inpaint"
    assert "8 samples each, inpaint by" in capsys.readouterr().out
    assert "Held-out data, what was measured of them" in (run / "report.html").read_text()


def test_pixels_that_a_mask_shows_white_are_filled(run, tmp_path):
    missing = np.zeros((8, 8), bool)
    missing[2:5, 3:7] = True
    Image.fromarray(missing.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", missing)
    found = [restored(run, "inpaint", f"--mask={tmp_path / name}")[0] for name in ("mask.png", "mask.npy")]
    np.testing.assert_array_equal(*found)
    seen = np.broadcast_to(TRUTH[:, None], found[0].shape)[:, :, ~missing]
    np.testing.assert_allclose(found[0][:, :, ~missing], seen, atol=0.1)
    kept = len([*run.glob("restored-inpaint*.json")])
    assert kept >= 2, "what was restored otherwise is kept"
    np.save(tmp_path / "mask.npy", ~missing)
    restored(run, "inpaint", f"--mask={tmp_path / 'mask.npy'}")
    assert len([*run.glob("restored-inpaint*.json")]) == kept + 1, "by another mask of the same name, too"


def test_fewer_pixels_and_their_noise(run):
    samples, report = restored(run, "sr4")
    pooled = lambda x: x.reshape(*x.shape[:-3], 2, 4, 2, 4, 3).mean((-4, -2))
    np.testing.assert_allclose(pooled(samples), np.broadcast_to(pooled(TRUTH)[:, None], (2, 8, 2, 2, 3)), atol=0.12)
    _, noisy = restored(run, "sr4", "--restore.noise=0.3")
    assert report["mean"]["misfit"] < 0.15 < noisy["mean"]["misfit"]


@pytest.mark.parametrize(
    "words",
    [["--sampler=rk45:rtol=1e-3:atol=1e-3"], ["--sampler=repaint:2", "--sampling.nfe=32", "--restore.by=replacement"]],
    ids=str,
)
def test_samplers_that_choose_their_steps_or_go_back_restore_too(words, run, capsys):
    samples, report = restored(run, "inpaint", *words)
    np.testing.assert_allclose(
        samples[:, :, :4], np.broadcast_to(TRUTH[:, None, :4], samples[:, :, :4].shape), atol=0.1
    )
    assert 0.3 < samples[:, :, 4:].std() < 0.6
    assert report["nfe"] == 32 or "rk45" in words[0]


def test_a_table_that_was_fitted_for_another_network_is_told_before_the_work(run, tmp_path, capsys, monkeypatch):
    def draw(*_, **__):
        raise gddim.UserError("now it draws")

    monkeypatch.setattr("gddim.experiment.verbs.restore.draw_numbered", draw)
    sde = WHITE.sde
    table = gddim.GDDIM(2).coefficients(sde, gddim.power_grid(sde.horizon, 1e-3, 4))
    file = tmp_path / "a.npz"
    file.write_bytes(encode(table, {"process": "vp", "network": "another", "nfe": 4}))
    words = ["--task=sr2", f"--sampler=table:{file}", "--sampling.nfe=4", "--sampling.t-min=1e-3"]
    assert status_of(WHITE, "restore", f"--workdir={run}", *words) == 2
    told, refused = capsys.readouterr().err.splitlines()
    assert "was fitted for the network another, and this is " in told
    assert refused == "error: now it draws"


def test_every_word_is_a_measurement():
    shapes = {"inpaint": (32, 3), "sr2": (4, 4, 3), "deblur": (8, 8, 3), "deblur:2.5": (8, 8, 3), "colour": (8, 8, 1),
              "sense": (48,), "sense:0.5": (96,)}  # fmt: skip
    for task, shape in shapes.items():
        assert Restoration(task).operator((8, 8, 3))(jnp.zeros((8, 8, 3))).shape == shape


class Coloured(eqx.Module):
    """Data of one colour a class."""

    weight: jax.Array

    def __call__(self, x, level, cond=None, *, key=None):
        of = {-1: 0.0, 0: -0.5, 1: 0.5}
        told = sum(jnp.where(cond["label"] == k, v, 0.0) for k, v in of.items())
        c_skip = 0.25 / (0.25 + jnp.exp(8 * level))
        sigma = jnp.exp(4 * level)
        return (told - c_skip * x * jnp.sqrt(sigma**2 + 0.25)) * jnp.sqrt(sigma**2 + 0.25) / (
            0.5 * sigma
        ) + 0 * self.weight


@dataclasses.dataclass(frozen=True)
class ColouredConfig:
    width: int = 1

    def build(self, in_shape, out_channels, key):
        return Coloured(jnp.ones(()))


def test_of_classes_the_network_is_told_each_image_s_own_or_what_is_asked(tmp_path):
    experiment = dataclasses.replace(WHITE, net=ColouredConfig(), data=LabelledColours(2))
    run = make_run(tmp_path / "w", experiment)
    for words, colours in (([], (-0.5, 0.5)), (["--sampling.classes", "1"], (0.5, 0.5))):
        given = [
            "restore",
            f"--workdir={run}",
            "--task=inpaint",
            "--restore.images=2",
            "--restore.by=replacement",
            *words,
        ]
        assert status_of(experiment, *given) == 0
        with np.load(run / "restored-inpaint.npz", allow_pickle=False) as file:
            below = file["samples"][:, :, 4:] / 127.5 - 1
        np.testing.assert_allclose(below.mean((1, 2, 3, 4)), colours, atol=0.02)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--task is missing: accepted are inpaint, srN"),
        (["--task=magic"], "--task magic: accepted are inpaint, srN"),
        (["--task=sr3"], "--task sr3: 3 must be 2 or more and divide the sides of the images, 8×8"),
        (["--task=sr"], "--task sr: accepted are"),
        (["--task=deblur:-1"], "--task deblur:-1: accepted are"),
        (["--task=sense:2"], "--task sense:2: accepted are"),
        (["--task=sr2", "--mask=x.png"], "--mask x.png is of --task inpaint, not sr2"),
        (["--task=inpaint", "--mask=nowhere.png"], "--mask nowhere.png cannot be read: "),
        (["--task=inpaint", "--mask=MASK"], "is of shape (4, 8), the images are (8, 8)"),
        (["--task=inpaint", "--mask=BLACK"], "nothing is missing; what is white, or not 0, is to be filled"),
        (["--task=inpaint", "--mask=WORDS"], "cannot be read: it holds <U1, or what is not finite: a mask is of"),
        (["--task=inpaint", "--mask=NAN"], "cannot be read: it holds float64, or what is not finite"),
        (["--task=inpaint", "--restore.noise=-1"], "restore.noise must be at least 0, not -1"),
        (["--task=inpaint", "--restore.by=magic"], "--restore.by magic: accepted is one of moments, pseudoinverse"),
        (["--task=inpaint", "--restore.samples=0"], "restore.samples must be at least 1, not 0"),
        (["--task=inpaint", "--sampling.classes", "1"], "this run knows no classes"),
    ],
)  # fmt: skip
def test_what_cannot_be_restored_is_one_line(words, says, run, tmp_path, capsys):
    Image.fromarray(np.full((4, 8), 255, np.uint8)).save(tmp_path / "m.png")
    np.save(tmp_path / "b.npy", np.zeros((8, 8)))
    np.save(tmp_path / "w.npy", np.full((8, 8), "a"))
    np.save(tmp_path / "n.npy", np.full((8, 8), np.nan))
    for word, name in {"MASK": "m.png", "BLACK": "b.npy", "WORDS": "w.npy", "NAN": "n.npy"}.items():
        words = [each.replace(word, str(tmp_path / name)) for each in words]
    assert says in refusal(WHITE, run, capsys, "restore", *words)


@dataclasses.dataclass(frozen=True)
class HeldOut(Colours):
    """Of which those to train on are not there."""

    def train(self):
        raise gddim.UserError("the records to train on are not there")

    def test(self):
        return Colours().test()


def test_records_that_are_not_there_are_missed_before_the_work(run, capsys, monkeypatch):
    monkeypatch.setattr("gddim.experiment.verbs.restore.draw_numbered", None)  # which would be an error of its own
    lost = dataclasses.replace(WHITE, data=HeldOut())
    assert "are not there" in refusal(lost, run, capsys, "restore", "--task=sr2")


def test_runs_and_verbs_that_restore_nothing_are_one_line(run, tmp_path, capsys):
    says = lambda experiment, *words: (status_of(experiment, *words), capsys.readouterr().err)
    assert says(WHITE, "sample", f"--workdir={run}", "--task=sr2") == (
        2, "error: --task, --mask and --restore are of the verb restore, not of sample\n"
    )  # fmt: skip
    assert "holds no run" in says(WHITE, "restore", f"--workdir={tmp_path / 'none'}", "--task=sr2")[1]
    small = dataclasses.replace(points.EXPERIMENT, net=dataclasses.replace(points.EXPERIMENT.net, width=8, depth=1))
    status, said = says(small, "restore", f"--workdir={make_run(tmp_path / 'points', small)}", "--task=inpaint")
    assert (status, "restore measures images (H, W, C), and these are records (2,)" in said) == (2, True)
    grey = dataclasses.replace(WHITE, data=cld_digits.EXPERIMENT.data)
    status, said = says(grey, "restore", f"--workdir={make_run(tmp_path / 'grey', grey)}", "--task=colour")
    assert (status, "--task colour: these images are grey, (8, 8, 1)" in said) == (2, True)
    eps = dataclasses.replace(WHITE, sde=gddim.CLD()).predicting_eps()
    status, said = says(eps, "restore", f"--workdir={make_run(tmp_path / 'eps', eps)}", "--task=sr2")
    assert (status, "this network predicts the ε of cld" in said) == (2, True)
    (run / "restored-sr2.json").write_text("mine")
    status, said = says(WHITE, "restore", f"--workdir={run}", "--task=sr2")
    (run / "restored-sr2.json").unlink()
    assert (status, "was not written by this program and is not overwritten" in said) == (2, True)
