"""Words for samplers, tables of results, and the command line that makes them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gddim.errors import UserError
from gddim.evaluation import __main__ as command_line
from gddim.evaluation.inception import InceptionFeatures, InceptionV3
from gddim.evaluation.paper_tables import TABLES
from gddim.evaluation.report import groups, plot, table
from gddim.evaluation.statistics import Statistics
from gddim.evaluation.sweep import read_rows
from gddim.samplers import Heun
from gddim.samplers.words import parse_sampler, sampler_name, steps_for

WORDS = (
    "gddim:3, gddim:3:data, gddim:1:lam=0.5, gddim:1:lam=0.3333333333333333, "
    "gddim:2:lam=0.1:corrector:data, cholesky:2, em, em:lam=1, heun, sscs, "
    "rk45, rk45:rtol=0.001"
)


@pytest.mark.parametrize("word", WORDS.split(", "))
def test_a_sampler_and_its_word_are_each_others_inverse(word: str):
    assert sampler_name(parse_sampler(word)) == word


@pytest.mark.parametrize("word", ["", "ddim", "gddim:0", "gddim:3:3", "gddim:x", "em:2", "gddim:lam=-1", "heun:data"])
def test_a_wrong_word_is_one_line_that_names_it(word: str):
    with pytest.raises(UserError, match=f"sampler '{word}'") as caught:
        parse_sampler(word)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "nfe", "last", "steps"),
    [
        ("gddim:3", 10, "none", 10),
        ("gddim:3", 10, "data", 9),
        ("gddim:2:corrector", 10, "none", 5),
        ("heun", 11, "none", 5),
        ("heun", 11, "euler", 5),
        ("heun", 3, "euler", 1),
    ],
)
def test_steps_spend_at_most_the_network_calls_given(word: str, nfe: int, last: Any, steps: int):
    assert steps_for(parse_sampler(word), nfe, last) == steps


def test_too_few_network_calls_are_refused():
    with pytest.raises(UserError, match="at least 3 calls"):
        steps_for(Heun(), 2, "euler")


def cifar_row(sampler: str, nfe: int, frechet: float, seed: int = 0, samples: int = 50_000) -> dict:
    cell = {
        "sampler": sampler,
        "nfe": nfe,
        "samples": samples,
        "seed": seed,
        "power": 2.0,
        "t_min": 1e-3,
        "last": "none",
    }
    origin = {"process": "CLD(m_inv=4.0)", "features": "inception-2015", "reference": {"source": "CIFAR10, to train"}}
    metrics = {"frechet": frechet, "kid": 0.001, "kid_error": 1e-4}
    return {"cell": cell, "provenance": origin, "metrics": metrics, "measured": {"nfe": float(nfe)}}


def test_the_table_has_means_and_spreads_of_seeds_the_floor_and_the_published_numbers(tmp_path: Path):
    rows = [cifar_row("gddim:3", 50, fid, seed) for seed, fid in enumerate((2.2, 2.3, 2.4))]
    rows += [cifar_row("gddim:3", 20, 3.5), cifar_row("em:lam=1", 20, 300.0)]
    lost = cifar_row("em:lam=1", 50, 0.0)
    rows.append(lost | {"metrics": {}, "measured": {"nfe": 50.0, "not_finite": "2 of samples 0 to 63"}})
    floor = cifar_row("data", 0, 3.15)
    floor["cell"]["source"] = "CIFAR10, held out"
    text = table([floor, *rows])
    lines = text.splitlines()
    assert "| FID | NFE 20 | NFE 50 |" in lines
    assert "| gddim:3 | 3.50 | 2.30 ± 0.1, least 2.20 |" in lines
    assert "| em:lam=1 | 300.00 | diverged |" in lines
    assert "| *gDDIM, Table 3* | 3.39 | 2.26 |" in lines
    assert "| *Euler–Maruyama, Table 3* | > 100 | 57.72 |" in lines
    assert "| *R, three nodes, Table 1* | 3.90 | 2.26 |" in lines
    assert "| *AGM-ODE, arXiv 2310.07805* | 2.58 |  |" in lines, "of a process of its own, beside all"
    assert "| CIFAR10, held out (floor) | 3.15 | 3.15 |" in lines
    assert "Mean ± standard deviation over 3 seeds." in lines
    assert "| em:lam=1 | 0.001 | diverged |" in lines, "the error of a KID is none over seeds"
    alone = table([cifar_row("gddim:3", 50, 2.3), cifar_row("heun", 51, 2.4) | {"measured": {"nfe": 50.0}}])
    assert "| gddim:3 | 0.001 ± 0.0001 |  |" in alone
    assert "\nKID ± its standard error.\n" in alone
    assert "| heun |  | 2.40 at 50 |" in alone
    assert "VP" not in text
    few = table([cifar_row("gddim:3", 50, 9.0, samples=5000)])
    assert "FID of only 5,000 samples" in few
    plot([floor, *rows], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert min(image.size) > 300


def test_a_floor_is_in_the_tables_of_what_it_was_measured_by():
    floor = cifar_row("data", 0, 3.15)
    floor["cell"]["source"], floor["metrics"] = "CIFAR10, held out", {"frechet": 3.15}
    assert table([floor, cifar_row("gddim:3", 50, 2.3)]).count("CIFAR10, held out (floor)") == 1


def test_what_is_not_the_same_is_neither_averaged_nor_taken_for_it():
    """A table that was fitted again under its name, an average of another length, and CIFAR-100."""
    first, again = (cifar_row("table:a.npz", 5, fid) for fid in (9.0, 7.0))
    for row, digest in ((first, "1"), (again, "2")):
        row["cell"]["parameters"] = f"LearnedTable({digest})"
    assert "| table:a.npz | 7.00 |" in table([first, again])
    usual, long = (cifar_row("gddim:3", 50, fid) for fid in (2.3, 2.4))
    for row, weights in ((usual, "EMA"), (long, "EMA of σ_rel 0.1")):
        row["provenance"] |= {"experiment": "a", "weights": weights}
    one, other = (group.heading for group in groups([usual, long]))
    assert other == f"{one}, EMA of σ_rel 0.1"
    hundred = cifar_row("gddim:3", 50, 2.3)
    assert "Table 3" in table([hundred])
    hundred["provenance"]["reference"]["source"] = "CIFAR-100, to train"
    assert "Table 3" not in table([hundred])


def test_results_without_a_cell_are_no_picture(tmp_path: Path):
    with pytest.raises(UserError, match="no results yet"):
        plot([], tmp_path / "p.png")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cell": {"sampler": "gddim:3"}}, "cell of a row lacks nfe, samples, seed"),
        ({"measured": {}}, "measured of a row lacks nfe"),
        ({"provenance": {"process": "CLD()", "features": "pixels"}}, "provenance of a row lacks reference"),
        ({"metrics": [1.0]}, "no results"),
    ],
)
def test_rows_without_what_a_table_needs_are_no_results(tmp_path: Path, change: dict, says: str):
    (tmp_path / "r.jsonl").write_text(json.dumps(cifar_row("gddim:3", 50, 2.3) | change))
    with pytest.raises(UserError, match=says):
        read_rows(tmp_path / "r.jsonl")


def test_published_numbers_are_those_of_the_paper():
    found = {(row.process, row.label): row.values for row in TABLES}
    assert len(found) == 12 + 12 + 4
    assert found["AGM", "AGM-ODE, arXiv 2310.07805"] == {5: 11.88, 10: 4.54, 20: 2.58}
    assert found["EDM", "Heun, EDM, arXiv 2206.00364"] == {35: 1.97}
    assert found["CLD", "gDDIM, Table 3"] == {10: 13.41, 20: 3.39, 50: 2.26, 100: 2.26, 1000: 2.25}
    assert found["VP", "RK45, Table 3"] == {10: "> 100", 20: 52.5, 50: 6.62, 100: 2.63, 1000: 2.56}
    assert found["Blurring", "ancestral, Table 3"] == {10: "> 100", 20: "> 100", 50: 29.8, 100: 9.73, 1000: 2.51}
    assert found["CLD", "Euler–Maruyama, order 1, λ = 0.7, Table 2"] == {50: 45.0}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gddim.evaluation", *map(str, arguments)])
    try:
        command_line.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command ends."""
    weightless = InceptionFeatures(InceptionV3({}, None), "", "tf1")
    monkeypatch.setattr(command_line.InceptionFeatures, "load", lambda *_: weightless)
    capsys.readouterr()
    assert command(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert "\n" not in told
    return told


def test_what_cannot_be_compared_is_refused_before_features_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command_line, "source_statistics", None)
    pixels = ("--features", "pixels")
    said = lambda *arguments: refused(monkeypatch, capsys, *arguments)
    np.savez(tmp_path / "mu.npz", mu=np.zeros(5), sigma=np.eye(5))
    assert "dimension 5 cannot be compared with pixels, 64" in said("fid", "digits:test", tmp_path / "mu.npz", *pixels)
    np.savez(tmp_path / "few.npz", samples=np.zeros((3, 8, 8, 1), np.uint8))
    assert "few.npz holds 3 records" in said("fid", "digits:test", tmp_path / "few.npz", *pixels)
    assert "no images of 1 or 3 channels" in said("stats", "five-rings", tmp_path / "rings.npz")
    (tmp_path / "file").write_text("")
    assert "file" in said("stats", "digits", tmp_path / "file" / "s.npz", *pixels)
    for mu, sigma in (((2,), (3, 3)), ((3, 1), (3, 3)), ((3,), (3,))):
        np.savez(tmp_path / "mu.npz", mu=np.zeros(mu), sigma=np.zeros(sigma))
        assert "are needed" in said("fid", "digits", tmp_path / "mu.npz", *pixels)
    for wrong in (np.array([[1, 0.5], [0, 1]]), np.full((2, 2), np.nan)):
        np.savez(tmp_path / "mu.npz", mu=np.zeros(2), sigma=wrong)
        assert "not finite and symmetric" in said("fid", "digits", tmp_path / "mu.npz", *pixels)
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "x.npz", a=np.zeros(2), b=np.zeros(2))
    assert "x.npz has arrays a, b" in said("stats", tmp_path / "other", tmp_path / "s.npz", *pixels)


def test_statistics_are_read_by_other_programs_and_files_of_samples_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pixels, points = ("--features", "pixels"), np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    (tmp_path / "kept").mkdir()
    for i, part in enumerate(np.split(points, 3)):
        np.savez(tmp_path / "kept" / f"{i}.npz", samples=part)
    assert command(monkeypatch, "stats", tmp_path / "kept", tmp_path / "s.npz", *pixels) == 0
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_allclose(file["mu"], points.mean(0), atol=1e-6)
        np.testing.assert_allclose(file["sigma"], np.cov(points.T), atol=1e-6)
    grey = np.random.default_rng(1).integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    np.save(tmp_path / "grey.npy", grey)
    np.save(tmp_path / "floats.npy", (grey / 127.5 - 1 + 1e-3).astype(np.float32).clip(-1, 1))
    capsys.readouterr()
    assert command(monkeypatch, "fid", tmp_path / "grey.npy", tmp_path / "floats.npy", *pixels) == 0
    assert "Fréchet distance 0.0000" in capsys.readouterr().out


def test_images_of_any_proportion_are_those_of_the_same_pixels_as_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pixels, wide = ("--features", "pixels"), np.random.default_rng(0).integers(0, 256, (12, 4, 6, 3), dtype=np.uint8)
    (tmp_path / "wide").mkdir()
    for i, x in enumerate(wide):
        Image.fromarray(x).save(tmp_path / "wide" / f"{i:02d}.png")
    np.savez(tmp_path / "others.npz", wide, np.arange(12))
    assert command(monkeypatch, "fid", tmp_path / "wide", tmp_path / "others.npz", *pixels) == 0
    assert "Fréchet distance 0.0000 (12 and 12" in capsys.readouterr().out
    np.savez(tmp_path / "samples.npz", samples=(wide / 255).astype(np.float32))
    np.save(tmp_path / "flat.npy", wide[..., 0])
    for file, says in (
        ("samples.npz", "found 0 to 1: scale"),
        ("flat.npy", "uint8 (12, 4, 6); of grey images make it"),
    ):
        assert says in refused(monkeypatch, capsys, "fid", tmp_path / "wide", tmp_path / file, *pixels)
    (tmp_path / "wide" / "00.png").write_bytes(b"no image")
    assert "cannot read 00.png" in refused(monkeypatch, capsys, "stats", tmp_path / "wide", tmp_path / "s.npz", *pixels)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pixels = ("--features", "pixels")
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, x in enumerate(images):
        Image.fromarray(x).save(tmp_path / "images" / f"{i:02d}.png")
    np.savez(tmp_path / "samples.npz", samples=images)
    assert command(monkeypatch, "stats", "digits", tmp_path / "digits.npz", *pixels) == 0
    assert Statistics.load(tmp_path / "digits.npz").origin["versions"]["gddim"]
    capsys.readouterr()
    assert command(monkeypatch, "fid", tmp_path / "digits.npz", "digits:test", *pixels) == 0
    assert "Fréchet distance 0.5624 (1,500 and 297 samples; fewer than 10,000" in capsys.readouterr().out
    assert command(monkeypatch, "fid", tmp_path / "images", tmp_path / "samples.npz", *pixels) == 0
    assert "Fréchet distance 0.0000 (60 and 60" in capsys.readouterr().out
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert command(monkeypatch, "fid", tmp_path / "foreign.npz", tmp_path / "foreign.npz") == 0
    assert "Fréchet distance 0.0000" in capsys.readouterr().out
    for wrong in (
        ("stats", "digits", tmp_path / "digits.npz", *pixels),
        ("stats", "nothing", tmp_path / "new.npz", *pixels),
        ("stats", "five-rings", tmp_path / "new.npz"),
        ("fid", tmp_path / "digits.npz", "digits:test"),
        ("report", tmp_path / "none.jsonl", tmp_path / "out"),
    ):
        refused(monkeypatch, capsys, *wrong)
    assert not (tmp_path / "new.npz").exists()
    rows = [cifar_row("gddim:3", 50, 2.3)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(monkeypatch, "report", tmp_path / "r.jsonl", tmp_path / "out") == 0
    assert (tmp_path / "out.md").read_text() == table(rows)
    assert (tmp_path / "out.png").exists()
    (tmp_path / "README.md").write_text("# mine")
    refused(monkeypatch, capsys, "report", tmp_path / "r.jsonl", tmp_path / "README")
    assert (tmp_path / "README.md").read_text() == "# mine"
    floor = cifar_row("data", 0, 3.15)  # of an evaluation that was interrupted in its first cell
    floor["cell"]["source"] = "held out"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.jsonl").write_text(json.dumps(floor) + "\n")
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)  # not installed, nor needed
    assert command(monkeypatch, "report", tmp_path / "run") == 0
    assert (tmp_path / "run" / "report.html").exists()
