"""Data that a command line gives: samples that start from them, noised, and what lies between them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from command_line import refusal, status_of
from etils import epath
from PIL import Image
from runs import WHITE, Colours, LabelledColours, make_run

import gddim
from gddim.experiment.cli import execute, parse
from gddim.experiment.drawing import NoisedData
from gddim.experiment.given import given_data
from gddim.samplers import OnGrid
from gddim.samplers.grids import noise_level, time_at
from gddim.samplers.inversion import Coder
from gddim.samplers.learned import encode

IMAGES = Colours().train()[np.arange(2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "w", WHITE)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(2)]


@pytest.mark.parametrize(
    "sde", [gddim.VP(), gddim.CLD(), gddim.VE(), gddim.Blurring(8)], ids=lambda sde: type(sde).__name__
)
def test_a_noise_level_has_its_time(sde):
    for sigma in (0.1, 0.5, 5.0):
        np.testing.assert_allclose(noise_level(sde, np.array([time_at(sde, sigma)])), sigma, rtol=1e-6)
    assert time_at(sde, np.inf) == sde.horizon


def drawn(run: Path, *words: str) -> np.ndarray:
    assert status_of(WHITE, "sample", f"--workdir={run}", *words) == 0
    with np.load(run / "samples.npz", allow_pickle=False) as file:
        return file["samples"] / 127.5 - 1


@pytest.mark.parametrize(("process", "strengths"), [("vp", (0.1, 0.6)), ("cld", (0.1,))])
def test_of_white_data_samples_keep_what_the_noise_left(run, files, process, strengths, capsys):
    """The flow of N(0, s²) scales `x₀ + σn` by `s/√(s² + σ²) = √(1 − strength)`; that of CLD also turns it."""
    given = np.repeat(IMAGES / 127.5 - 1, 4, axis=0)
    for strength in strengths:
        x = drawn(run, f"--process={process}", "--sampling.nfe=12", "--from", *files, f"--strength={strength}")
        kept = (x * given).sum() / (given**2).sum()
        assert abs(kept - (1 - strength) ** 0.5) < 0.08
    assert "from data noised to t = " in capsys.readouterr().out
    assert not (run / "trajectory.png").exists()


def test_noise_alone_is_the_prior(run, files):
    x = drawn(run, "--from", files[0], "--strength=1", "--process=ve")
    assert abs((x * (IMAGES[0] / 127.5 - 1)[None]).mean()) < 0.03
    start = NoisedData.of(WHITE, IMAGES, 0.5)
    np.testing.assert_allclose(noise_level(WHITE.sde, np.array([start.time])), 0.5, rtol=1e-6)


def test_what_lies_between_given_images(run, files, tmp_path, capsys):
    np.save(tmp_path / "a.npy", IMAGES)
    for words in (files, [str(tmp_path / "a.npy")]):
        argv = ["encode", f"--workdir={run}", "--sampler=gddim:2", "--sampling.nfe=20", "--from", *words]
        assert status_of(WHITE, *argv) == 0
        assert "2 given records encoded and decoded" in capsys.readouterr().out
        with np.load(run / "latents.npz", allow_pickle=False) as file:
            assert file["samples"].shape == (2, 8, 8, 1, 3)
    assert (run / "interpolations.png").exists()
    np.save(tmp_path / "b.npy", IMAGES[::-1])
    assert status_of(WHITE, *argv[:-1], str(tmp_path / "b.npy")) == 0
    assert status_of(WHITE, *argv[: argv.index("--from")], "--sampling.samples=2") == 0
    for name in ("latents.npz", "reconstructions.png", "interpolations.png"):
        first, last = name.split(".")
        kept = [run / name, run / f"{first}-1.{last}", run / f"{first}-2.{last}"]
        assert all(path.exists() for path in kept), "what is of other data, given or held out, is kept"


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "words",
    [[], ["--sampling.grid=karras"], ["--sampling.power=3"], ["--sampler=gddim:2", "--sampling.grid=log-snr"],
     ["--sampler=gddim:2@uniform"], ["--sampler=gddim:2@uniform", "--sampling.power=3"]],
    ids=" ".join,
)  # fmt: skip
def test_the_times_of_latents_are_those_that_samples_have(words, run, monkeypatch):
    seen = []

    def stop(model, grid, order):
        seen.append(grid)
        raise Stopped

    monkeypatch.setattr(Coder, "of", stop)
    command = parse(WHITE, ["encode", f"--workdir={run}", *words])
    with pytest.raises(Stopped):
        execute(command)
    method = command.experiment.sampling.method(WHITE.sde, WHITE.data.shape)
    times, sampler = method.grid(WHITE.sde), method.sampler
    np.testing.assert_allclose(*seen, sampler.times(WHITE.sde, times) if isinstance(sampler, OnGrid) else times)


def test_images_of_other_sizes_are_brought_to_that_of_the_data(run, tmp_path):
    wide = np.full((20, 40, 3), 200, np.uint8)
    wide[:, :10] = wide[:, 30:] = 0
    Image.fromarray(wide).save(tmp_path / "wide.png")
    x = drawn(run, "--from", str(tmp_path / "wide.png"), "--strength=0.001")
    np.testing.assert_allclose(x, 200 / 127.5 - 1, atol=0.15)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample", "--from", "nowhere.png"], "--from nowhere.png cannot be read: "),
        (["sample", "--from", "FOLDER"], "is a folder: give files, as "),
        (["sample", "--from", "OTHER"], "holds records (4, 4, 3), the run's are (8, 8, 3)"),
        (["sample", "--from", "EMPTY"], "empty.npy holds no records"),
        (["sample", "--from", "FILE", "--strength=0"], "strength must be in (0, 1], not 0"),
        (["sample", "--from", "FILE", "--strength=1e-9"], "strength 1e-09: that is time "),
        (["sample", "--from", "FILE", "FILE", "--sampling.samples=1"], "--from: 2 images, and 1 to be drawn"),
        (["sample", "--from"], "--from needs files"),
        (["sample", "--strength=0.7"], "--strength is of sample --from FILE"),
        (["encode", "--from", "FILE", "--sampler=gddim:2"], "1 records are given, encode needs at least 2"),
        (["encode", "--sampler=gddim:2", "--sampling.grid=two-phase", "--sampling.nfe=1"], "sampling.grid two-phase"),
        (["evaluate", "--from", "FILE"], "--from is of the verbs sample and encode, not of evaluate"),
    ],
)
def test_what_cannot_be_given_is_one_line(words, says, run, files, tmp_path, capsys):
    np.save(tmp_path / "other.npy", np.zeros((2, 4, 4, 3), np.uint8))
    np.save(tmp_path / "empty.npy", np.zeros((0, 8, 8, 3), np.uint8))
    places = {"FILE": files[0], "FOLDER": str(tmp_path)}
    places |= {name.upper(): str(tmp_path / f"{name}.npy") for name in ("other", "empty")}
    assert says in refusal(WHITE, run, capsys, *(places.get(word, word) for word in words))


def test_arrays_in_a_bucket_are_refused(monkeypatch):
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", lambda self: True)
    with pytest.raises(
        gddim.UserError, match=r"--from gs://bucket/a\.npy: arrays are read from the disk: copy it here"
    ):
        given_data(["gs://bucket/a.npy"], (8, 8, 3))


def test_latents_are_there_before_what_lies_between_is_drawn(run, monkeypatch):
    def stop(*_):
        assert (run / "latents.npz").exists()
        raise Stopped

    (run / "latents.npz").unlink(missing_ok=True)
    monkeypatch.setattr("gddim.experiment.verbs.encode.interpolate", stop)
    with pytest.raises(Stopped):
        execute(parse(WHITE, ["encode", f"--workdir={run}", "--sampling.nfe=2"]))


def test_files_of_both_scales_are_of_one(files, tmp_path):
    dark = np.full((1, 8, 8, 3), -0.25, np.float32)
    dark[0, 0] = -1
    np.save(tmp_path / "a.npy", dark)
    found = given_data([files[0], str(tmp_path / "a.npy")], (8, 8, 3))
    np.testing.assert_allclose(found, [IMAGES[0] / 127.5 - 1, dark[0]], atol=1e-6)
    assert given_data(files, (8, 8, 3)).dtype == np.uint8


def test_given_images_are_no_more_than_what_is_drawn_of_all_classes():
    def start(count: int, per_class: int) -> NoisedData:
        sampling = dataclasses.replace(WHITE.sampling, per_class=per_class)
        labelled = dataclasses.replace(WHITE, data=LabelledColours(3), sampling=sampling)
        return NoisedData.of(labelled, np.resize(IMAGES, (count, 8, 8, 3)), 0.5)

    assert len(start(9, 3).data) == 9
    with pytest.raises(gddim.UserError, match="10 images, and 9 to be drawn"):
        start(10, 3)
    with pytest.raises(gddim.UserError, match="4 images, and 3 to be drawn"):
        start(4, 1)


def test_a_table_begins_where_it_was_fitted_to(run, files, tmp_path, capsys):
    grid = gddim.power_grid(1.0, 1e-3, 3)
    table = gddim.GDDIM(2, interpolate="data").coefficients(gddim.VP(), grid)
    (tmp_path / "vp.npz").write_bytes(encode(table, {"process": "vp", "network": "abc", "nfe": 3}))
    words = ["sample", "--sampling.nfe=3", f"--sampler=table:{tmp_path / 'vp.npz'}", "--from", files[0]]
    said = refusal(WHITE, run, capsys, *words, "--strength=0.5")
    assert "strength 0.5: that is time 0.14, and " in said
    assert "vp.npz starts at 1, not at 0.14" in said
    assert len(NoisedData.of(parse(WHITE, words).experiment, IMAGES, 1.0).data) == 2


def test_points_are_given_as_arrays(tmp_path, capsys):
    from experiments import points

    small = dataclasses.replace(points.EXPERIMENT, net=dataclasses.replace(points.EXPERIMENT.net, width=8, depth=1))
    run = make_run(tmp_path / "w", small)
    np.save(tmp_path / "p.npy", np.zeros((3, 2), np.float32) - 0.1)
    words = ["--sampling.samples=6", "--sampling.batch=8", "--sampling.nfe=3"]
    assert status_of(small, "sample", f"--workdir={run}", "--from", str(tmp_path / "p.npy"), *words) == 0
    assert status_of(small, "sample", f"--workdir={run}", "--from", str(tmp_path / "x.png"), *words) == 2
    assert "of records (2,) give arrays, as .npy or .npz" in capsys.readouterr().err
