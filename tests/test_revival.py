"""What follows training takes its settings from the run; a configuration becomes the experiment that it describes."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import status_of
from etils import epath
from runs import COLOUR, NET, make_run

import gddim
from experiments import processes
from gddim import weights
from gddim.checkpoint import by_path
from gddim.data import CelebA, FiveRings, ImageFolder
from gddim.experiment import Experiment, Model, Sampling, Spectrum, Training
from gddim.experiment.revival import as_trained, objects, revived
from gddim.experiment.trained import find
from gddim.experiment.workdir import OBJECTS, describe
from gddim.export.model import exported
from gddim.nn import MLPConfig
from gddim.samplers import GDDIM, Heun
from gddim.sde.words import parse_process

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if "EXPERIMENT = " in path.read_text())


def kept(experiment: Experiment) -> dict:
    """A configuration as a run keeps it."""
    return json.loads(json.dumps(describe(experiment) | {OBJECTS: objects(experiment)}))


@pytest.mark.parametrize("name", FILES)
def test_every_experiment_comes_back_from_its_configuration(name):
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    own = {"sde": experiment.sde} if name == "blurred_cld_cifar10" else {}
    found = revived(kept(experiment), **own)
    for part in ("name", "sde", "net", "model", "sampling"):
        assert getattr(found, part) == getattr(experiment, part), part
    assert found.data.shape == experiment.data.shape
    if own:
        with pytest.raises(gddim.UserError, match="give it as sde="):
            revived(kept(experiment))


WORDS = "vp:beta_max=10", "cosine", "subvp", "ve", "flow", "cld:gamma=0.1", "psld:gamma=0.1", "langevin:order=4"
PROCESSES = [*map(parse_process, WORDS), gddim.Blurring(8), gddim.VP.from_betas(np.linspace(1e-4, 0.02, 10))]


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: f"{type(sde).__name__} {sde.k}")
def test_every_process_of_the_package_comes_back(sde):
    assert revived(kept(dataclasses.replace(COLOUR, sde=sde, data=CelebA(size=8)))).sde == sde


def test_a_spectrum_is_kept_by_its_numbers():
    rms = tuple(map(tuple, np.random.default_rng(0).uniform(0.1, 1, (8, 8)).tolist()))
    blurred = dataclasses.replace(
        COLOUR, sde=gddim.Blurring(8), model=Model(data_std=Spectrum(rms)), data=CelebA(size=8)
    )
    assert revived(kept(blurred)).model.data_std == Spectrum(rms)
    with pytest.raises(gddim.UserError, match="spectrum, which the run does not keep"):
        revived(kept(blurred) | {OBJECTS: {}})


class Mine(gddim.VP):
    """Not the package's, though its fields are those of one."""


def test_no_configuration_makes_it_import_or_take_a_namesake(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} is imported"))
    config = kept(dataclasses.replace(COLOUR, data=CelebA(size=8)))
    process = {"process": "os:system", OBJECTS: {"sde": "os:system"}}
    with pytest.raises(gddim.UserError, match="give it as sde="):
        revived(config | process)
    assert revived(config | {"process": "os:system"}).sampling.process is None
    with pytest.raises(gddim.UserError, match="give it as sde="):
        revived(config | {OBJECTS: {"sde": "somewhere.VP"}})


@pytest.mark.parametrize("file", ["/dev/zero", "gs://bucket/file"])
def test_a_configuration_has_no_file_read(file):
    config = kept(dataclasses.replace(COLOUR, data=CelebA(size=8)))
    assert revived(config | {"sampler": f"table:{file}"}).sampling.sampler == Sampling().sampler
    with pytest.raises(gddim.UserError, match=f"its data_std is {file}, no number"):
        revived(config | {"model": config["model"] | {"data_std": file}})


def test_a_run_says_what_its_file_does_not_and_its_data_are_where_they_are(tmp_path):
    trained = dataclasses.replace(
        COLOUR,
        sde=gddim.CLD(gamma=0.1),
        train=Training(steps=7, batch=8),
        sampling=Sampling(sampler=GDDIM(2), nfe=3, process=gddim.VP()),
        data=ImageFolder(str(tmp_path / "gone"), size=16),
    )
    file = dataclasses.replace(
        COLOUR, net=MLPConfig(), sampling=Sampling(sampler=Heun()), data=ImageFolder(str(tmp_path), size=8)
    )
    found = as_trained(file, kept(trained))
    for part in ("sde", "net", "train", "sampling", "seed"):
        assert getattr(found, part) == getattr(trained, part), part
    assert (found.data.size, found.data.path) == (16, str(tmp_path)), (
        "the place of the data is the file's, their size the run's"
    )
    (tmp_path / "gone").mkdir()
    assert as_trained(file, kept(trained)).data.path == str(tmp_path / "gone"), "unless they are where the run had them"
    rings = as_trained(dataclasses.replace(file, data=FiveRings(10, 10)), kept(trained))
    assert rings.data == FiveRings(10, 10)
    own = dataclasses.replace(COLOUR, sde=processes.blurred_langevin_8(), data=CelebA(size=8))
    assert as_trained(own, kept(own)).sde == own.sde


def test_verbs_after_training_need_no_option_repeated(tmp_path, capsys):
    run = dataclasses.replace(
        COLOUR, net=dataclasses.replace(NET, width=8), sampling=Sampling(samples=4, batch=4, nfe=3)
    )
    make_run(tmp_path / "w", run)
    assert status_of(COLOUR, "sample", f"--workdir={tmp_path / 'w'}") == 0
    said = capsys.readouterr()
    assert "4 samples of step 2 by gddim:3:free:data:data_std=0.87@tuned: NFE 3," in said.out
    assert "as the run has it, not the experiment's file: sampling.batch, sampling.nfe, sampling.samples\n" in said.err
    assert status_of(COLOUR, "sample", f"--workdir={tmp_path / 'w'}", "--net.width=4") == 2
    assert "net.width: the run has 8, this command 4" in capsys.readouterr().err
    assert status_of(COLOUR, "sample", f"--workdir={tmp_path / 'w'}", "--sampling.nfe=2") == 0
    assert "NFE 2," in capsys.readouterr().out
    other = dataclasses.replace(COLOUR, name="another")
    assert status_of(other, "sample", f"--workdir={tmp_path / 'w'}") == 2
    assert 'name: the run has "colour", this command "another"' in capsys.readouterr().err


def test_frequencies_are_not_rounded(tmp_path):
    net = dataclasses.replace(COLOUR.net, embedding="fourier")
    run = make_run(tmp_path / "run", dataclasses.replace(COLOUR, net=net, model=Model(predicts="eps")), steps=(1,))
    found = find(epath.Path(run))
    arrays, trained = exported(found, "bfloat16", "").arrays, by_path(found.params)
    np.testing.assert_array_equal(arrays["net.frequencies"], trained["net.frequencies"])
    assert np.abs(arrays["net.conv_in.weight"].astype(np.float32) - trained["net.conv_in.weight"]).max() > 0
    weights.write(epath.Path(tmp_path / "f.safetensors"), exported(found, "bfloat16", ""))
    again = by_path(find(epath.Path(tmp_path / "f.safetensors")).params)
    np.testing.assert_array_equal(again["net.frequencies"], trained["net.frequencies"])
