"""Every verb of an experiment on colour images, and what it leaves behind."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from experiments import cld_digits
from gddim.data import ArrayFile
from gddim.experiment.cli import execute, parse
from gddim.experiment.config import Model
from gddim.sde import CLD, VP, AbstractLinearSDE, Blurring

WORDS = [
    *("--train.steps=2", "--train.batch=8", "--net.width=8", "--net.attention", "--net.multipliers", "1"),
    *("--sampling.samples=8", "--sampling.batch=8", "--sampling.nfe=3", "--eval.samples=8", "--eval.batch=8"),
    *("--eval.nfe", "4", "--eval.samplers", "gddim:2", "heun", "rk45", "--eval.processes", "own"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sde", "predicts"),
    [(CLD(), "data"), (CLD(), "eps"), (VP(), "data"), (Blurring(8), "data")],
    ids=["CLD", "CLD, eps", "VP", "Blurring"],
)
def test_every_verb_on_colour_images(sde: AbstractLinearSDE, predicts: Literal["data", "eps"], tmp_path: Path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8)
    np.save(tmp_path / "colours.npy", images)
    train = dataclasses.replace(cld_digits.EXPERIMENT.train, sigma_mean=None, sigma_std=None)
    experiment = dataclasses.replace(
        cld_digits.EXPERIMENT,
        sde=sde,
        data=ArrayFile(str(tmp_path / "colours.npy")),
        model=Model(predicts),
        train=train,
    )
    workdir = tmp_path / "w"
    for verb in ("train", "sample", "evaluate", "likelihood", "encode"):
        execute(parse(experiment, [verb, f"--workdir={workdir}", *WORDS]))
    with np.load(workdir / "samples.npz", allow_pickle=False) as file:
        assert file["samples"].shape == (8, 8, 8, 3)
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert [row["cell"]["sampler"] for row in rows] == ["data", "gddim:2", "heun", "rk45"]
    assert all(np.isfinite(row["metrics"]["frechet"]) for row in rows)
    found = json.loads((workdir / "likelihood.json").read_text())
    assert found["records"] == 8
    assert np.isfinite(found["bits_per_dimension"])
    with np.load(workdir / "latents.npz", allow_pickle=False) as file:
        assert file["samples"].shape == (8, 8, 8, sde.k, 3)
        assert np.isfinite(file["samples"]).all()
    for name in ("samples", "trajectory", "denoise", "reconstructions", "interpolations"):
        with Image.open(workdir / f"{name}.png") as image:
            assert image.mode.startswith("RGB")
    assert "held-out records encoded and decoded" in capsys.readouterr().out
