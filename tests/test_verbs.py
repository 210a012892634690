"""What an experiment's verbs leave behind: likelihood, latents, kept samples, seeds, what training tells on the way."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import status_of
from jax.sharding import PartitionSpec
from PIL import Image

from experiments import blur_cifar10, cld_digits, points
from gddim.data import FiveRings
from gddim.errors import harmless
from gddim.evaluation.features import PixelFeatures
from gddim.evaluation.statistics import source_statistics
from gddim.evaluation.sweep import read_rows
from gddim.experiment.cli import execute, main, parse
from gddim.experiment.config import Experiment
from gddim.experiment.plan import Plan
from gddim.experiment.verbs.dry_run import dry_run
from gddim.experiment.workdir import describe
from gddim.parallel import MeshConfig, default_rule

POINTS = [
    *("--train.steps=16", "--train.batch=16", "--train.warmup=4", "--train.save-every=8", "--train.report-every=4"),
    *("--net.width=16", "--net.depth=1", "--data.train-points=100", "--data.test-points=50"),
    *("--sampling.samples=8", "--sampling.batch=8", "--sampling.nfe=3", "--eval.samples=8", "--eval.batch=8"),
    *("--eval.nfe", "3", "--eval.samplers", "gddim:2", "em"),
]  # fmt: skip
DIGITS = [
    *("--train.steps=2", "--train.batch=8", "--net.width=8", "--net.attention", "--sampling.samples=8"),
    *("--sampling.batch=8", "--sampling.nfe=3", "--eval.samples=8", "--eval.batch=8", "--eval.nfe", "3"),
    *("--eval.samplers", "gddim:2", "--net.multipliers", "1"),
]  # fmt: skip


def do(experiment: Experiment, workdir: Path, verb: str, *more: str) -> None:
    words = POINTS if experiment is points.EXPERIMENT else DIGITS
    execute(parse(experiment, [verb, f"--workdir={workdir}", *words, *more]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "w"
    do(points.EXPERIMENT, workdir, "train")
    return workdir


@pytest.fixture(scope="module")
def trained_digits(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("digits") / "w"
    do(cld_digits.EXPERIMENT, workdir, "train")
    return workdir


def test_likelihood_is_told_and_written(trained, capsys):
    do(points.EXPERIMENT, trained, "likelihood")
    found = json.loads((trained / "likelihood.json").read_text())
    assert (found["records"], found["step"], found["kind"]) == (8, 16, "upper bound")
    assert np.isfinite(found["bits_per_dimension"])
    assert found["standard_error"] > 0
    assert f"{found['bits_per_dimension']:.4f} ± {found['standard_error']:.4f} bits" in capsys.readouterr().out
    assert found["t_min"] == 1e-5
    for _ in range(2):
        do(points.EXPERIMENT, trained, "likelihood", "--sampling.seed=1", "--sampling.t_min=0.1")
    assert json.loads((trained / "likelihood-1.json").read_text()) == found, "what is of another origin is kept"
    again = json.loads((trained / "likelihood.json").read_text())
    assert again["bits_per_dimension"] != found["bits_per_dimension"]
    assert again["t_min"] == found["t_min"], "the time at which samplers stop is none of it"
    assert not (trained / "likelihood-2.json").exists(), "of the same origin it is replaced"
    assert "gddim." not in re.search('id="likelihood".*?<h2', (trained / "report.html").read_text(), re.DOTALL)[0]
    with pytest.raises(SystemExit, match="2"):
        main(points.EXPERIMENT, ["likelihood", f"--workdir={trained}", *POINTS, "--eval.samples=1"])
    assert "eval.samples: 1 given, likelihood needs at least 2" in capsys.readouterr().err
    (trained / "likelihood.json").write_text("[]")
    with pytest.raises(SystemExit, match="2"):
        main(points.EXPERIMENT, ["likelihood", f"--workdir={trained}", *POINTS])
    assert "likelihood.json was not written by this program" in capsys.readouterr().err
    (trained / "likelihood.json").unlink()


def test_a_dry_run_speaks_on_process_0_alone(monkeypatch, capsys):
    plan = Plan(points.EXPERIMENT)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    dry_run(plan)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_encoding_writes_latents_and_pictures_of_digits(trained_digits, capsys):
    do(cld_digits.EXPERIMENT, trained_digits, "encode")
    with np.load(trained_digits / "latents.npz", allow_pickle=False) as file:
        assert file["samples"].shape == (8, 8, 8, 2, 1)
    with Image.open(trained_digits / "interpolations.png") as image:
        assert image.size[0] == 8 + 9 * 66 - 2 + 8
    with Image.open(trained_digits / "reconstructions.png") as image:
        assert image.size[0] == 80 + 8 * 82 - 2 + 8
    assert "8 held-out records encoded and decoded in 3 calls each way at step 2: root mean" in capsys.readouterr().out


def test_encoding_of_points_and_what_it_refuses(trained, capsys):
    do(points.EXPERIMENT, trained, "encode")
    assert (trained / "interpolations.png").exists()
    for word in ("heun", "gddim:2:lam=0.5", "gddim:2:corrector"):
        with pytest.raises(SystemExit, match="2"):
            main(points.EXPERIMENT, ["encode", f"--workdir={trained}", *POINTS, f"--sampler={word}"])
        assert "encode: it needs the coefficients of gddim" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(points.EXPERIMENT, ["encode", f"--workdir={trained}", *POINTS, "--sampling.samples=1"])
    assert "needs at least 2" in capsys.readouterr().err


def test_kept_points_are_arrays(trained):
    do(points.EXPERIMENT, trained, "evaluate", "--eval.keep-samples")
    files = sorted(file for file in (trained / "samples").rglob("*") if file.is_file())
    kept = [file for file in files if file.suffix == ".npz"]
    assert [file.name for file in kept] == ["000000.npz"] * 2
    assert sorted(set(files) - set(kept)) == [file.parent.with_suffix(".json") for file in kept]
    with np.load(kept[-1], allow_pickle=False) as file:
        assert file["samples"].shape == (8, 2)
    rows = [json.loads(line) for line in (trained / "results.jsonl").read_text().splitlines()]
    described = json.loads(kept[-1].parent.with_suffix(".json").read_text())
    assert described in rows, "what samples are stands beside them"
    before = (trained / "results.jsonl").read_bytes()
    kept[-1].parent.with_suffix(".json").unlink()
    kept[-1].unlink()
    do(points.EXPERIMENT, trained, "evaluate", "--eval.keep-samples")
    assert kept[-1].exists(), "drawn again where only the row is there"
    assert (trained / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_kept_images_are_pictures(trained_digits):
    do(cld_digits.EXPERIMENT, trained_digits, "evaluate", "--eval.keep-samples")
    assert len(list((trained_digits / "samples").rglob("*.png"))) == 16  # through either process
    found = json.loads((trained_digits / "classes.json").read_text())
    assert (found["step"], found["sampler"], found["nfe"]) == (2, "gddim:3:free:data@tuned", 3)
    row = read_rows(trained_digits / "results.jsonl")[-1]
    assert found["checkpoint"] == row["provenance"]["checkpoint"] in (trained_digits / "report.html").read_text()
    do(cld_digits.EXPERIMENT, trained_digits, "evaluate", "--sampling.seed=1", "--eval.samplers=em")
    assert json.loads((trained_digits / "classes-1.json").read_text()) == found, "what is of another origin is kept"


def test_several_seeds_are_a_mean_and_its_spread(trained):
    do(points.EXPERIMENT, trained, "evaluate", "--eval.seeds=3", "--eval.samplers", "gddim:2")
    rows = [json.loads(line) for line in (trained / "results.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["cell"]["sampler"] == "gddim:2"]
    assert sorted(row["cell"]["seed"] for row in rows) == [0, 1, 2]
    values = [row["metrics"]["frechet"] for row in rows]
    table = (trained / "results.md").read_text()
    mean, least = (f"{x:.{2 if x >= 1 else 3}{'f' if x >= 1 else 'g'}}" for x in (np.mean(values), min(values)))
    assert f"| gddim:2 | {mean} ± {np.std(values, ddof=1):.2g}, least {least} |" in table
    recall = [row["metrics"]["recall"] for row in rows]
    assert f"| gddim:2 | {np.mean(recall):.3g} ± {np.std(recall, ddof=1):.2g} |" in table
    assert "of only 8 samples" in table


def test_training_tells_its_throughput_and_evaluates_on_the_way(tmp_path, capsys):
    do(points.EXPERIMENT, tmp_path / "w", "train", "--eval.every=8", "--peak-flops=1e9")
    said = capsys.readouterr().out
    assert said.count("16, 8 samples: frechet ") == 2
    line = next(line for line in said.splitlines() if line.startswith("step 16/16: loss"))
    images, per_chip = (float(line.split(words)[0].split()[-1].strip("(")) for words in (" images/s", " per chip"))
    assert per_chip == pytest.approx(images / 8, rel=2e-3)
    share = float(line.split("% of peak FLOP/s")[0].split()[-1]) / 100
    forward = Plan(parse(points.EXPERIMENT, POINTS).experiment).image_flops()
    assert forward > 1000
    assert share == pytest.approx(3 * forward * per_chip / 1e9, abs=1e-3)
    assert len(list((tmp_path / "w" / "statistics").iterdir())) == 2


def test_what_an_evaluation_lacks_is_said_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GDDIM_DATA", str(tmp_path))
    words = [f"--workdir={tmp_path / 'w'}", *DIGITS, "--eval.features=inception"]
    for verb in ("train", "run"):
        with pytest.raises(SystemExit, match="2"):
            main(cld_digits.EXPERIMENT, [verb, *words, "--eval.every=5"])
        assert "no Inception weights: put https://" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(
            points.EXPERIMENT,
            ["run", f"--workdir={tmp_path / 'w'}", *POINTS, "--eval.nfe", "1", "--eval.samplers", "heun"],
        )
    assert "heun with last=none makes at least 2 calls" in capsys.readouterr().err
    for words, says in (
        ("run --sampler=heun --sampling.nfe=1", "makes at least 3 calls"),
        ("train --train.show-every=10 --sampler=sscs", "SSCS needs"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(blur_cifar10.EXPERIMENT, [*words.split(), f"--workdir={tmp_path / 'w'}"])
        assert says in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_run_without_the_weights_of_its_table_trains_and_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GDDIM_DATA", str(tmp_path))
    words = [f"--workdir={tmp_path / 'w'}", *DIGITS, "--eval.features=inception"]
    with pytest.raises(SystemExit, match="0"):
        main(cld_digits.EXPERIMENT, ["run", *words])
    said = capsys.readouterr().err
    assert "without a table at the end: no Inception weights: put https://" in said
    assert said.splitlines()[-1] == "without a table: the verb evaluate makes one later"
    assert (tmp_path / "w" / "samples.png").exists()
    assert not (tmp_path / "w" / "results.jsonl").exists()
    with pytest.raises(SystemExit, match="2"):
        main(cld_digits.EXPERIMENT, ["evaluate", *words])
    assert "no Inception weights: put https://" in capsys.readouterr().err


def test_more_than_the_data_and_the_disk_hold_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    words = ["train", f"--workdir={tmp_path / 'w'}", *POINTS, "--train.save-every=4"]

    assert status_of(points.EXPERIMENT, *words, "--train.batch=104") == 2
    assert capsys.readouterr().err == "error: --train.batch 104 is more than the 100 records of the data\n"
    assert not (tmp_path / "w").exists()
    free = Plan(parse(points.EXPERIMENT, words).experiment).state_bytes * 5 // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    assert status_of(points.EXPERIMENT, *words) == 2
    assert re.search(r"0 MiB free; 4 checkpoints of 0.0 MiB .* lower train.keep\n$", capsys.readouterr().err)
    assert all(harmless(path.name) for path in (tmp_path / "w").iterdir()), "but what holds it"
    assert status_of(points.EXPERIMENT, *words, "--train.keep=1") == 0, "two fit"
    assert status_of(points.EXPERIMENT, *words, "--train.keep=2") == 0, "of three one is there"


SWEEP = ["--eval.nfe", "5", "10", "20", "--eval.samplers", "gddim:2", "gddim:3:data", "em", "--eval.samples=400"]


@pytest.mark.slow
def test_a_sweep_of_digits_takes_minutes_and_killed_at_random_gives_the_same_table(tmp_path):
    words = [sys.executable, "-m", "experiments.cld_digits"]
    steps = ["--train.steps=60", "--eval.batch=100"]

    def start(verb: str, workdir: Path) -> subprocess.Popen:
        command = [*words, verb, f"--workdir={workdir}", *steps, *SWEEP]
        return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": ""}, stdout=subprocess.DEVNULL)

    assert start("train", tmp_path / "whole").wait() == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    began = time.monotonic()
    assert start("evaluate", tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - began
    assert seconds < 180
    results = tmp_path / "cut" / "results.jsonl"
    for rows_done in sorted(random.sample(range(1, 8), 2)):
        running = start("evaluate", tmp_path / "cut")
        while running.poll() is None and not (results.exists() and len(read_rows(results)) >= rows_done):
            time.sleep(0.02)
        time.sleep(random.uniform(0.0, 0.5))
        assert running.poll() is None, "it ended before it was killed"
        running.kill()
        running.wait()
    assert start("evaluate", tmp_path / "cut").wait() == 0
    found, expected = (
        [(row["cell"], row["provenance"], row["metrics"]) for row in read_rows(tmp_path / name / "results.jsonl")]
        for name in ("cut", "whole")
    )
    assert len(found) == 19  # of the floor, and of nine cells through either process
    assert found == expected
    assert (tmp_path / "cut" / "results.md").read_text() == (tmp_path / "whole" / "results.md").read_text()
    print(f"{seconds:.0f} s")


def whole_average(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    return PartitionSpec() if path.startswith("ema/") else default_rule(path, shape, mesh)


def test_a_rule_given_in_the_experiment_places_its_state():
    ours = dataclasses.replace(points.EXPERIMENT, mesh=MeshConfig(1, 8), rule=whole_average)
    experiment = parse(ours, ["train", *POINTS]).experiment
    assert experiment.rule is whole_average
    assert describe(experiment)["rule"].endswith("test_verbs.whole_average")
    state = Plan(experiment).init()
    assert {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.ema)} == {True}
    assert {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.model)} == {True, False}


def test_saved_statistics_can_be_the_reference(trained, tmp_path):
    saved = source_statistics(FiveRings(100, 40, seed=7).test(), PixelFeatures(), "other rings", progress=False)
    saved.save(tmp_path / "rings.npz")
    do(
        points.EXPERIMENT,
        trained,
        "evaluate",
        f"--eval.reference={tmp_path / 'rings.npz'}",
        "--eval.samplers",
        "gddim:2",
    )
    row = json.loads((trained / "results.jsonl").read_text().splitlines()[-1])
    assert row["provenance"]["reference"]["digest"] == saved.digest()
