"""A run's data are known by what they hold: they may move and change their form, but not their content."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from command_line import status_of
from data_helpers import files_below, pixels
from etils import epath
from PIL import Image

from experiments import cld_digits, points
from gddim.data import (
    ArrayFile,
    ArraySource,
    Dataset,
    ImageFolder,
    Shards,
    arrays,
    content,
    folders,
    identity,
    prepare,
)
from gddim.errors import UserError
from gddim.experiment import Experiment
from gddim.experiment.workdir import check_config, check_records, describe, read_config, remembering, write_config

POINTS = [
    *("--train.batch=16", "--train.warmup=4", "--net.width=16", "--net.depth=1", "--sampling.samples=8"),
    *("--sampling.batch=8", "--sampling.nfe=3"),
]  # fmt: skip
COLOURS = [
    *("--train.batch=8", "--net.width=8", "--net.attention", "--net.multipliers", "1", "--sampling.samples=8"),
    *("--sampling.batch=8", "--sampling.nfe=3"),
]  # fmt: skip


def on(data: Dataset) -> Experiment:
    """An experiment on images or points of the user's own."""
    colours = isinstance(data, ImageFolder) or "images" in str(data)
    return dataclasses.replace(cld_digits.EXPERIMENT if colours else points.EXPERIMENT, data=data)


def ended(data: Dataset, verb: str, workdir: Path, *more: str) -> int:
    words = COLOURS if on(data).name == "cld_digits" else POINTS
    return status_of(on(data), verb, f"--workdir={workdir}", *words, *more)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i in range(12):
        Image.fromarray(pixels(i, 8, 8, 3)).save(folder / ("sub" if i % 2 else ".") / f"{i}.png")
    return folder


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for name in reversed(files_below(folder)):
            archive.write(folder / name, name)
    return folder.with_suffix(".zip")


def test_records_are_the_same_wherever_they_lie_and_as_whatever(photos, tmp_path):
    data = ImageFolder(str(photos), 8)
    before = identity(data.train())
    assert {name: before[name] for name in ("count", "shape", "dtype", "flip")} == {
        "count": 11, "shape": [8, 8, 3], "dtype": "uint8", "flip": False,
    }  # fmt: skip
    prepare(data, tmp_path / "shards", shard_bytes=4 * 192)
    prepare(data, tmp_path / "earlier")
    manifest = json.loads((tmp_path / "earlier" / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]:
        del shard["records"]
    (tmp_path / "earlier" / "manifest.json").write_text(json.dumps(manifest))
    np.savez(tmp_path / "a.npz", train=data.train()[np.arange(11)], test=data.test()[np.arange(1)])
    for same in (
        ImageFolder(str(zipped(photos)), 8),
        Shards(str(tmp_path / "shards")),
        Shards(str(tmp_path / "earlier")),
    ):
        assert identity(same.train()) == before
    assert identity(ArrayFile(str(tmp_path / "a.npz")).train()) == before
    moved = photos.rename(tmp_path / "elsewhere")
    assert identity(ImageFolder(f"{tmp_path}/./elsewhere", 8).train()) == before
    assert identity(ImageFolder(str(moved), 4).train())["shape"] == [4, 4, 3]


def test_a_record_more_or_less_changed_or_elsewhere_is_another_set():
    images = pixels(0, 3000, 4, 4, 3)
    changed = images.copy()
    changed[2900, 3, 3, 2] ^= 1
    others = [images, images[:-1], changed, images[::-1], np.concatenate([images[:1], images[2:], images[1:2]])]
    assert len({identity(ArraySource(np.ascontiguousarray(other)))["digest"] for other in others}) == 5
    assert identity(ArraySource(images, rows=np.arange(3000)[::-1])) == identity(ArraySource(images[::-1]))


def test_what_is_large_is_read_again_only_when_a_file_has_changed(photos, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", pixels(0, 100, 4, 4, 3))
    small = identity(ImageFolder(str(photos), 8).train())
    monkeypatch.setattr(arrays, "_LARGE", 1000)
    monkeypatch.setattr(folders, "_KEEP_DECODED", 0)
    for data, change in (
        (ArrayFile(str(tmp_path / "a.npy")), lambda path: np.save(path, pixels(1, 100, 4, 4, 3))),
        (ImageFolder(str(photos), 8), lambda path: Image.fromarray(pixels(99, 8, 8, 3)).save(path / "4.png")),
    ):
        before = identity(data.train())
        path = Path(data.path).rename(tmp_path / f"moved{Path(data.path).suffix}")
        moved = dataclasses.replace(data, path=str(path))
        read = []
        monkeypatch.setattr(content, "_digest", lambda source, read=read: read.append(source) or 0)
        assert identity(moved.train(), before) == before
        assert read == []
        identity(dataclasses.replace(moved, test_every=3).train(), before)
        assert len(read) == 1
        monkeypatch.undo()
        monkeypatch.setattr(arrays, "_LARGE", 1000)
        monkeypatch.setattr(folders, "_KEEP_DECODED", 0)
        change(path)
        assert identity(moved.train(), before)["digest"] != before["digest"]
    assert {name: value for name, value in before.items() if name != "stamp"} == small


def as_trained(data: Dataset, workdir: Path) -> dict:
    """A workdir as training on these data leaves it; returns its configuration."""
    config = describe(on(data))
    write_config(epath.Path(workdir), config | {"records": identity(data.train())})
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    return config


def test_images_may_move_and_become_shards_but_not_change(photos, tmp_path):
    workdir, data = epath.Path(tmp_path / "w"), ImageFolder(str(photos), 8)
    before = json.loads(json.dumps(as_trained(data, workdir) | {"records": identity(data.train())}))
    prepare(data, tmp_path / "shards_of_images")
    moved = ImageFolder(str(photos.rename(tmp_path / "elsewhere")), 8)
    for same in (moved, ImageFolder(f"{tmp_path}/w/../elsewhere", 8), Shards(str(tmp_path / "shards_of_images"))):
        assert check_config(workdir, describe(on(same)), ())
        assert check_records(workdir, describe(on(same)), same.train()) == before["records"]

    def refusal(data: Dataset) -> list[str]:
        with pytest.raises(UserError) as caught:
            check_records(workdir, describe(on(data)), data.train())
        told, *lines = str(caught.value).splitlines()
        assert told == f"--workdir {workdir} holds a run on other records; bring those back, or give another folder:"
        return [line.split(", this command")[0] for line in lines if "digest" not in line and "path" not in line]

    assert refusal(dataclasses.replace(moved, flip=True)) == [
        "  data.flip: the run has false", "  records.flip: the run has false"
    ]  # fmt: skip
    Image.fromarray(pixels(99, 8, 8, 3)).save(tmp_path / "elsewhere" / "0.png")
    assert refusal(moved) == []
    Image.fromarray(pixels(98, 8, 8, 3)).save(tmp_path / "elsewhere" / "x.png")
    assert refusal(moved) == ["  records.count: the run has 11"]
    assert read_config(workdir) == before
    assert remembering(on(moved), f"--workdir {workdir}", read_config(workdir)).data == moved, "free after training"
    with pytest.raises(UserError, match=r"holds a run on records \(8, 8, 3\), and these are \(16, 16, 3\)"):
        remembering(on(dataclasses.replace(moved, size=16)), f"--workdir {workdir}", read_config(workdir))


@pytest.mark.slow
def test_a_run_goes_on_wherever_its_images_are(photos, tmp_path, capsys):
    workdir, data = tmp_path / "w", ImageFolder(str(photos), 8)
    assert ended(data, "train", workdir, "--train.steps=1") == 0
    prepare(data, tmp_path / "shards_of_images")
    moved = ImageFolder(str(photos.rename(tmp_path / "elsewhere")), 8)
    for step, same in enumerate((Shards(str(tmp_path / "shards_of_images")), moved), 1):
        assert ended(same, "train", workdir, f"--train.steps={step + 1}") == 0, capsys.readouterr().err
        assert f"training from step {step} to {step + 1} on 11" in capsys.readouterr().out
    Image.fromarray(pixels(99, 8, 8, 3)).save(tmp_path / "elsewhere" / "0.png")
    assert ended(moved, "train", workdir, "--train.steps=4") == 2
    shutil.rmtree(tmp_path / "elsewhere")
    assert ended(moved, "sample", workdir) == 0, "nothing is read"


def test_a_run_goes_on_wherever_its_points_are_and_refuses_others(tmp_path, capsys):
    workdir, path = tmp_path / "w", tmp_path / "a.npy"
    array = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    np.save(path, array)
    assert ended(ArrayFile(str(path)), "train", workdir, "--train.steps=1") == 0
    assert "training from step 0 to 1 on 90 records (2,)" in capsys.readouterr().out
    prepare(ArrayFile(str(path)), tmp_path / "shards")
    moved = ArrayFile(str(path.rename(tmp_path / "b.npy")))
    assert ended(Shards(str(tmp_path / "shards")), "train", workdir, "--train.steps=2") == 0
    assert ended(moved, "train", workdir, "--train.steps=3") == 0
    before = (workdir / "config.json").read_text()
    np.save(tmp_path / "b.npy", array + 1)
    capsys.readouterr()
    assert ended(moved, "train", workdir, "--train.steps=4") == 2
    assert "\n  records.digest: the run has " in capsys.readouterr().err
    assert (workdir / "config.json").read_text() == before
    assert ended(moved, "sample", workdir) == 0


def test_a_run_of_an_earlier_version_goes_on_and_says_that_its_records_are_unknown(tmp_path, capsys):
    workdir, path = tmp_path / "w", tmp_path / "a.npy"
    np.save(path, np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32))
    assert ended(ArrayFile(str(path)), "train", workdir, "--train.steps=1") == 0
    config = json.loads((workdir / "config.json").read_text())
    del config["records"]
    (workdir / "config.json").write_text(json.dumps(config))
    moved = ArrayFile(str(path.rename(tmp_path / "b.npy")))
    assert ended(moved, "sample", workdir) == 0
    capsys.readouterr()
    for words, count in (("--train.steps=2", 1), ("--train.steps=3", 0)):
        assert ended(moved, "train", workdir, words) == 0
        said = capsys.readouterr().err
        assert said.count("does not tell the records that it was trained on; they are taken for these\n") == count
    assert ended(dataclasses.replace(moved, test_every=5), "train", workdir, "--train.steps=4") == 2


def test_records_that_a_network_does_not_take_are_told_as_the_user_has_them(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.linspace(-1, 1, 5120, dtype=np.float32).reshape(20, 16, 16))
    assert ended(ArrayFile(str(tmp_path / "images.npy")), "train", tmp_path / "w") == 2
    assert capsys.readouterr().err.startswith("error: records (16, 16): an NCSN++ takes images (H, W, C), not ")


@pytest.mark.parametrize("form", [ArrayFile, Shards])
def test_an_experiment_is_built_helped_and_sampled_without_its_data(form, tmp_path, capsys):
    workdir, path = tmp_path / "w", tmp_path / "a.npy"
    data = form(str(path if form is ArrayFile else tmp_path / "shards"))
    assert ended(data, "train", workdir, "--help") == 0
    assert "--data.path" in capsys.readouterr().out
    assert ended(data, "train", workdir) == 2
    assert capsys.readouterr().err.count("\n") == 1
    np.save(path, np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32))
    prepare(ArrayFile(str(path)), tmp_path / "shards")
    assert ended(data, "train", workdir, "--train.steps=1") == 0
    path.unlink()
    shutil.rmtree(tmp_path / "shards")
    assert ended(data, "sample", workdir) == 0, capsys.readouterr().err
    with np.load(workdir / "samples.npz") as file:
        assert file["samples"].shape == (8, 3)
    for verb, notes in (("train", ["as the run has it"]), ("evaluate", [])):
        assert ended(data, verb, workdir, "--train.steps=2") == 2
        *told, error = capsys.readouterr().err.splitlines()
        assert [line.split(",")[0] for line in told] == notes
        assert error.startswith("error: ")
