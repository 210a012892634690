"""infra/window.py: a bare machine is set up, and what comes back of a window is enough to go on."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from gddim import compact
from gddim.parallel import EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("--train.batch=16", "--train.warmup=4", "--train.report-every=100", "--train.steps=100000"),
    *("--train.ema-profiles", "0.05", "0.1", "--net.width=16", "--net.depth=1", "--data.train-points=100"),
    *("--data.test-points=50", "--eval.samples=8", "--eval.batch=8", "--eval.nfe", "3", "--eval.samplers", "gddim:2"),
]  # fmt: skip


def window(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "infra" / "window.py", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def wheel(folder: Path) -> Path:
    """A package that no machine has."""
    folder.mkdir()
    info = "borrowed-1.dist-info"
    with zipfile.ZipFile(folder / "borrowed-1-py3-none-any.whl", "w") as file:
        file.writestr("borrowed.py", "from experiments.points import EXPERIMENT, main\nmain(EXPERIMENT)\n")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: borrowed\nVersion: 1\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return folder


def told(out: Path) -> dict[str, dict]:
    return {phase["name"]: phase for phase in json.loads((out / "window.json").read_text())["phases"]}


def load():
    spec = importlib.util.spec_from_file_location("window", ROOT / "infra" / "window.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_agrees_with_the_package():
    module = load()
    assert module.PREEMPTED == EXIT_PREEMPTED
    assert module.FILE_BYTES >= compact.PART_BYTES


@pytest.mark.parametrize(("room", "kept"), [(67, "both"), (3.5, "second"), (3, "none"), (2.1, None)])
def test_the_state_has_the_moments_for_which_there_is_room(tmp_path, room, kept):
    sizes = {"both": 1_800_000, "second": 1_400_000, "none": 900_000}
    built = load().Window.__new__(load().Window)
    built.work, built.workdir, built.out, built.given = tmp_path, tmp_path / "run", tmp_path, Namespace(room=room)

    def write(name, *words):
        (tmp_path / "state").mkdir()
        moments = words[-1].removeprefix("--moments=")
        for part in (1, 2):
            (tmp_path / "state" / f"{part}-of-2.safetensors").write_bytes(bytes(sizes[moments] // 2))
        return 0

    built.python = write
    assert built.export() == (kept is not None)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) == sizes.get(kept, 0)


def test_a_terminal_without_the_letters_gets_the_help():
    command = [sys.executable, ROOT / "infra" / "window.py", "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [2])
def test_two_windows_are_one_run(tmp_path, minutes):
    """On a machine with nothing but the wheels, which forgets all but what came back."""
    first = [tmp_path / "a", "--minutes", minutes, "--work", tmp_path / "w", "--wheels", wheel(tmp_path / "wheels")]
    asked = ("--laws", "gddim:VP", "--benchmark-minutes", 0.7)
    done = window(*first, *asked, "--", "borrowed", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    assert files.keys() == {"1-of-1.safetensors", "run.tar.gz", "window.json"}
    assert max(files.values()) <= 16_000_000
    phases = told(tmp_path / "a")
    assert [*phases] == ["wheels", "laws-float32", "laws-bfloat16", "benchmark", "train", "export", "evaluate"]
    stopped = {"train": EXIT_PREEMPTED, "benchmark": -signal.SIGTERM}
    assert {name: phase["status"] for name, phase in phases.items() if phase["status"]} == stopped
    assert "| figure | value | baseline | ratio | target |" in log(tmp_path / "a", "benchmark")
    assert 60 * minutes <= phases["train"]["seconds"] <= 60 * minutes + 60
    with tarfile.open(tmp_path / "a" / "run.tar.gz") as tar:
        names = tar.getnames()
    assert {"logs/train.log", "logs/laws-bfloat16.log", "run/config.json", "run/results.jsonl", "run/tensorboard"} <= {
        *names
    }

    second = [tmp_path / "b", "--minutes", 0.05, "--work", tmp_path / "x", "--wheels", tmp_path / "wheels"]
    more = ("--init", tmp_path / "a", "--without", "laws", "benchmark", "evaluate", "--", "borrowed", *SMALL)
    done = window(*second, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (compact.read(epath.Path(tmp_path / name)) for name in "ab")
    assert two.step > one.step > 0
    assert two.about["count"] == two.step
    assert f"from {tmp_path / 'a'}, step {one.step}: " in log(tmp_path / "b", "train")


def log(out: Path, name: str) -> str:
    with tarfile.open(out / "run.tar.gz") as tar:
        file = tar.extractfile(f"logs/{name}.log")
        assert file is not None
        return file.read().decode()


def test_a_window_that_cannot_train_says_so_and_brings_its_log(tmp_path):
    words = (
        "--minutes",
        0.01,
        "--without",
        "laws",
        "benchmark",
        "evaluate",
        "--",
        "experiments.points",
        "--no-such-option",
    )
    done = window(tmp_path / "out", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "failed: train" in done.stdout
    assert "unknown option --no-such-option" in log(tmp_path / "out", "train")
    assert told(tmp_path / "out")["train"]["status"] == 2


@pytest.mark.parametrize("words", [["out"], ["new", "--init", "none"], ["new", "--data", "none"]])
def test_what_cannot_be_is_refused_before_anything_is_done(tmp_path, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    done = window(*words, "--minutes", 1, "--", "experiments.points", cwd=tmp_path)
    assert done.returncode == 2
    assert "folder" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "window").exists()


def test_atlases_become_the_official_files(tmp_path, monkeypatch):
    """Record i of a file is the image in row i // 100, column i % 100 of its atlas."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    (folder / "inception").mkdir(parents=True)
    slope = np.add.outer(np.arange(32), 2 * np.arange(32)).astype(np.uint8)[..., None]  # no image is its own transpose
    tiles = {name: rng.integers(0, 150, (100, 100, 3), dtype=np.uint8) for name in ("train_3", "test")}
    atlases = {
        name: np.kron(tile, np.ones((32, 32, 1), np.uint8)) + np.tile(slope, (100, 100, 1))
        for name, tile in tiles.items()
    }
    for name, pixels in atlases.items():
        Image.fromarray(pixels).save(folder / f"{name}.webp", lossless=True, method=0)
    y = {"y_train": rng.integers(0, 10, 50_000), "y_test": rng.integers(0, 10, 10_000)}
    np.savez(folder / "labels.npz", **y)
    module = load()
    monkeypatch.setattr(sys, "argv", ["window.py"])
    monkeypatch.setenv("GDDIM_DATA", "x")
    built = module.Window.__new__(module.Window)
    built.work, built.site = tmp_path / "work", tmp_path / "site"
    built.data(folder)
    for file, name, labels in (
        ("data_batch_4.bin", "train_3", y["y_train"][30_000:40_000]),
        ("test_batch.bin", "test", y["y_test"]),
    ):
        raw = np.fromfile(tmp_path / "work" / "data" / "cifar-10-batches-bin" / file, np.uint8).reshape(10_000, 3073)
        np.testing.assert_array_equal(raw[:, 0], labels)
        image = raw[4_217, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(image, atlases[name][42 * 32 : 43 * 32, 17 * 32 : 18 * 32])
    assert (tmp_path / "work" / "data" / "inception").is_dir()
