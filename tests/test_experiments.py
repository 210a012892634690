"""The shipped experiments: what each says of itself, and that its cost is told before it starts."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from etils import epath

from experiments import cld_digits
from gddim import power_grid
from gddim.experiment.checkpoints import trained
from gddim.experiment.cli import parse
from gddim.experiment.network import told_augmentation
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import check_same, describe, may_change
from gddim.nn import NCSNppConfig
from gddim.parallel import MeshConfig
from gddim.samplers.words import BEST

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "experiments").glob("*.py") if "EXPERIMENT = " in path.read_text())
PUBLISHED = {
    "cifar10": 15_780_931,
    "cifar10_tiny": 1_260_547,
    "cld_cifar10": 107_597_446,
    "cld_cifar10_mixed": 107_597_446,
    "cld_cifar10_small": 61_811_334,
    "cld_digits": None,
    "points": None,
}


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{name}", *arguments]


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_every_experiment_says_what_it_is(name):
    module = importlib.import_module(f"experiments.{name}")
    experiment = module.EXPERIMENT
    assert experiment.name == name
    assert f"python -m experiments.{name}" in module.__doc__
    words = ("Hardware:",) if "cifar10" not in name else ("Paper:", "Hardware:", "Steps:", "Expected", "Measured:")
    assert all(word in module.__doc__ for word in words)
    json.dumps(describe(experiment))
    assert (experiment.sampling.sampler == BEST) == (experiment.model.predicts == "data")


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_published_times_stand_and_another_grid_may_be_asked_for(name):
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    if experiment.model.predicts == "eps":
        sde, sampling = experiment.sde, experiment.sampling
        np.testing.assert_array_equal(
            sampling.method(sde, experiment.data.shape).grid(sde), power_grid(sde.horizon, 1e-3, sampling.nfe - 1)
        )
    assert str(parse(experiment, ["sample", "--sampling.grid=band"]).experiment.sampling.grid) == "band"


def parameters(name: str) -> int:
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    *dims, channels = experiment.data.shape
    fields = experiment.sde.k * channels
    width = fields if experiment.model.predicts == "eps" else channels
    told = told_augmentation(experiment.net, experiment.train.augment, experiment.data.shape)
    net = eqx.filter_eval_shape(told.build, (*dims, width), width, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(net))


@pytest.mark.parametrize("name", ["cifar10", "cifar10_tiny"])
def test_the_weights_of_an_experiment_are_its_own(name):
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    file = Path(experiment.weights)
    assert file == ROOT / "experiments" / "weights" / f"{name}.safetensors"
    assert parameters(name) == PUBLISHED[name]
    assert file.exists() or name == "cifar10"
    if file.exists():
        found = trained(experiment, epath.Path("nowhere"))
        assert found
        check_same(*found, describe(experiment), may_change(experiment, after=True))
        assert file.stat().st_size < 40e6


def test_operations_are_counted_however_blocks_are_compiled():
    net = NCSNppConfig(width=8, multipliers=(1, 2), blocks=3, attention=(4,), embedding="positional")
    found = []
    for options in ({}, {"scan_blocks": True}, {"remat": True}):
        plan = Plan(dataclasses.replace(cld_digits.EXPERIMENT, net=dataclasses.replace(net, **options)))
        found.append((plan.image_flops(), plan.step_flops()))
    assert found[0] == found[1] == found[2]


def test_operations_are_counted_for_the_devices_of_the_plan():
    net = NCSNppConfig(width=8, multipliers=(1,), blocks=2, attention=(), remat=True, embedding="positional")
    two = dataclasses.replace(cld_digits.EXPERIMENT, net=net, mesh=MeshConfig(data=2))
    assert Plan(two, jax.devices()[:2]).image_flops() > 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[] if path.stem in ("points", "cld_digits", "cld_cifar10") else pytest.mark.slow)
        for path in FILES
    ],
)
def test_a_dry_run_tells_the_cost(name, tmp_path):
    """In seconds of a processor that does nothing else; a multiply and an add of every weight are a lower bound."""
    before = os.times()
    done = subprocess.run(
        command(name, "train", "--dry-run", f"--workdir={tmp_path / 'w'}"), cwd=ROOT, capture_output=True, text=True
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    count = int(told["parameters"].replace(",", ""))
    assert count == parameters(name)
    assert count == (PUBLISHED.get(name) or count)
    forward, step = (int(told[key].replace(",", "")) for key in ("FLOPs per image, forward", "FLOPs per training step"))
    train = importlib.import_module(f"experiments.{name}").EXPERIMENT.train
    assert forward >= 2 * count * 0.9
    assert 2.5 < step / (train.batch * forward) < 4
    size = int(told["state"].split(" bytes")[0].replace(",", ""))
    averages = max(1, len(train.ema_profiles))
    assert size == 4 * ((3 + averages) * count + 2)  # parameters, averages, two moments, and two counts of steps
    assert not (tmp_path / "w").exists()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 40  # 20 where nothing else runs
