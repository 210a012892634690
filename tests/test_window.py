"""infra/window.py: a bare machine is set up, and what comes back of a window is enough to go on."""

import importlib.util
import itertools
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
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


def wheel(folder: Path, name: str = "borrowed", inside: str = ".") -> Path:
    """A package that no machine has."""
    folder.mkdir()
    info = f"{name}-1.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as file:
        file.writestr(f"{inside}/{name}.py", "from experiments.points import EXPERIMENT, main\nmain(EXPERIMENT)\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
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


def built(folder: Path, *words: object):
    """A window that is not run."""
    module = load()
    given = {
        "out": folder / "out",
        "work": folder / "work",
        "limit": math.inf,
        "room": 67,
        "experiment": ["none"],
    } | dict.fromkeys(("data", "wheels"))
    found = module.Window(Namespace(**given | dict(zip(words[::2], words[1::2], strict=True))))
    for made in (found.out, found.logs):
        made.mkdir(parents=True)
    return module, found


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('began', flush=True); time.sleep(99)"
)


@pytest.mark.parametrize(
    ("code", "status"),
    [("import time; time.sleep(99)", -15), (STUBBORN, -9), ("exit(3)", 3)],
    ids=["asked", "killed", "ended"],
)
def test_a_command_ends_within_its_time(tmp_path, code, status):
    module, found = built(tmp_path)
    module.GRACE, began = 1.0, time.monotonic()
    assert found.python("x", "-c", code, seconds=2) == status
    assert time.monotonic() - began < 20
    assert found.said[-1]["status"] == status


def test_the_last_command_ends_whatever_signal_came(tmp_path):
    _, found = built(tmp_path)
    found.stop()
    assert found.python("train", "-c", "pass", seconds=9) is None
    assert found.python("export", "-c", "import time; time.sleep(0.5)", seconds=9, last=True) == 0


def test_a_driver_that_does_not_work_is_an_error(tmp_path, monkeypatch):
    module, found = built(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for devices, told in ((str(tmp_path / "nvidia[0-9]*"), "None"), (str(tmp_path / "o[a-z]t"), "cuda,cpu")):
        module.DEVICES = devices
        found.python("x", "-c", "import os; print(os.environ.get('JAX_PLATFORMS'))", seconds=9)
        assert found.said[-1]["said"] == [told]


def test_wheels_of_two_calls_are_there_together(tmp_path):
    """Also what they have in one folder."""
    _, found = built(tmp_path)
    for name in ("one", "two"):
        found.given.wheels, found.given.data = str(wheel(tmp_path / name, f"borrowed_{name}", "shared")), None
        found.set_up()
    assert {path.name for path in (found.site / "shared").iterdir()} == {"borrowed_one.py", "borrowed_two.py"}


def test_what_there_is_no_time_for_is_left_out_and_what_is_done_is_packed(tmp_path):
    wanted = {"laws": ["gddim:VP"], "benchmark": ["networks"], "measure_minutes": 4, "evaluate_minutes": 6}
    _, found = built(tmp_path, "limit", 0.0, "without", ["train"], *itertools.chain(*wanted.items()))
    assert found.run() == []
    names = ("laws-float32", "laws-bfloat16", "networks", "evaluate")
    assert {name: phase["status"] for name, phase in told(found.out).items()} == dict.fromkeys(names)


def test_a_terminal_without_the_letters_gets_the_help():
    command = [sys.executable, ROOT / "infra" / "window.py", "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [2])
def test_two_windows_are_one_run(tmp_path, minutes):
    """On a machine with nothing but the wheels, which forgets all but what came back."""
    first = [tmp_path / "a", "--minutes", minutes, "--work", tmp_path / "w", "--wheels", wheel(tmp_path / "wheels")]
    asked = ("--laws", "gddim:VP", "--benchmark", "networks", "--measure-minutes", 2)
    done = window(*first, *asked, "--", "borrowed", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    assert files.keys() == {"1-of-1.safetensors", "run.tar.gz", "window.json"}
    assert max(files.values()) <= 16_000_000
    phases = told(tmp_path / "a")
    assert [*phases] == ["wheels", "begin", "laws-float32", "laws-bfloat16", "networks", "train", "export", "evaluate"]
    stopped = {"begin": EXIT_PREEMPTED, "train": EXIT_PREEMPTED, "networks": -signal.SIGTERM}
    assert {name: phase["status"] for name, phase in phases.items() if phase["status"]} == stopped
    assert "| figure | value | baseline | ratio | target |" in log(tmp_path / "a", "networks")
    assert 60 * minutes <= phases["train"]["seconds"] <= 60 * minutes + 60
    with tarfile.open(tmp_path / "a" / "run.tar.gz") as tar:
        names = tar.getnames()
    assert {"logs/train.log", "logs/laws-bfloat16.log", "run/config.json", "run/results.jsonl", "run/tensorboard"} <= {
        *names
    }

    second = [tmp_path / "b", "--minutes", 0.05, "--work", tmp_path / "x", "--wheels", tmp_path / "wheels"]
    more = ("--init", tmp_path / "a", "--without", "measure", "evaluate", "--", "borrowed", *SMALL)
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


@pytest.mark.parametrize(("without", "first"), [(["measure"], "train"), ([], "begin")])
def test_a_window_that_cannot_train_says_so_first_and_brings_its_log(tmp_path, without, first):
    words = ("--minutes", 0.01, "--without", *without, "--", "experiments.points", "--no-such-option")
    done = window(tmp_path / "out", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert f"failed: {first}" in done.stdout
    assert "unknown option --no-such-option" in log(tmp_path / "out", first)
    assert {name: phase["status"] for name, phase in told(tmp_path / "out").items()} == {first: 2}


@pytest.mark.parametrize("asked", ["limit", "signal"])
def test_a_window_that_is_ended_keeps_what_it_trained(tmp_path, asked):
    """Under a limit there is a table, too."""
    limit = ["--limit", 2.4, "--evaluate-minutes", 0.5, "--without"] if asked == "limit" else ["--minutes", 60]
    without = ["measure"] if asked == "limit" else ["--without", "measure", "evaluate"]
    command = [tmp_path / "out", *limit, *without, "--", "experiments.points", *SMALL]
    command = [sys.executable, str(ROOT / "infra" / "window.py"), *map(str, command)]
    began = time.monotonic()
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as child:
        said = tmp_path / "window" / "logs" / "train.log"
        while asked == "signal" and not (said.exists() and "training from step 0" in said.read_text()):
            time.sleep(0.2)
            assert time.monotonic() < began + 120
        if asked == "signal":
            child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=150)
    assert child.returncode == 0, output
    assert time.monotonic() - began < 60 * 2.4
    phases = told(tmp_path / "out")
    evaluated = {"evaluate": 0} if asked == "limit" else {}
    statuses = {name: phase["status"] for name, phase in phases.items()}
    assert statuses == {"train": EXIT_PREEMPTED, "export": 0} | evaluated
    assert compact.read(epath.Path(tmp_path / "out")).step > 0
    assert "saved at step" in log(tmp_path / "out", "train")


REFUSED = {
    "out": "is there already",
    "new --init none": "--init none is no folder",
    "new --data none": "--data none is no folder",
    "new --wheels none": "--wheels none is no folder",
    "new --wheels out": "is a folder without a wheel",
    "new --work out": "--work out holds something else",
    "new --work new": "OUT and --work are one folder",
    "new --room 2": "--room must be more than 2 MB, not 2",
    "new --minutes 0": "--minutes must be more than 0, not 0",
    "new --limit nan": "--limit must be more than 0, not nan",
}


@pytest.mark.parametrize(("words", "why"), REFUSED.items())
def test_what_cannot_be_is_refused_before_anything_is_done(tmp_path, words, why):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    minutes = [] if "--minutes" in words else ["--minutes", 1]
    done = window(*words.split(), *minutes, "--", "experiments.points", cwd=tmp_path)
    assert done.returncode == 2
    assert why in done.stderr.splitlines()[-1]
    assert not (tmp_path / "window").exists()
    assert not (tmp_path / "new").exists()


def test_a_time_is_asked_for(tmp_path):
    done = window("new", "--", "experiments.points", cwd=tmp_path)
    assert done.returncode == 2
    assert "give --minutes of training, or the --limit of all" in done.stderr


def test_what_is_packed_becomes_the_official_files(tmp_path):
    """Record i of a file is the image in row i // 100, column i % 100 of its atlas."""
    rng = np.random.default_rng(0)
    folder, data = tmp_path / "given", tmp_path / "work" / "data"
    for name in ("cifar10", "inception", "others"):
        (folder / name).mkdir(parents=True)
    slope = np.add.outer(np.arange(32), 2 * np.arange(32)).astype(np.uint8)[..., None]  # no image is its own transpose
    tiles = {name: rng.integers(0, 150, (100, 100, 3), dtype=np.uint8) for name in ("train_3", "test")}
    atlases = {
        name: np.kron(tile, np.ones((32, 32, 1), np.uint8)) + np.tile(slope, (100, 100, 1))
        for name, tile in tiles.items()
    }
    for name, pixels in atlases.items():
        Image.fromarray(pixels).save(folder / "cifar10" / f"{name}.webp", lossless=True, method=0)
    y = {"y_train": rng.integers(0, 10, 50_000), "y_test": rng.integers(0, 10, 10_000)}
    np.savez(folder / "cifar10" / "labels.npz", **y)
    (folder / "inception" / "network.pth.xz").write_bytes(lzma.compress(b"weights"))
    (folder / "others" / "x.npy").touch()
    (folder / "others" / "cat.webp").touch()
    _, found = built(tmp_path)
    found.unpack(folder, data)
    for file, name, labels in (
        ("data_batch_4.bin", "train_3", y["y_train"][30_000:40_000]),
        ("test_batch.bin", "test", y["y_test"]),
    ):
        raw = np.fromfile(data / "cifar-10-batches-bin" / file, np.uint8).reshape(10_000, 3073)
        np.testing.assert_array_equal(raw[:, 0], labels)
        image = raw[4_217, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(image, atlases[name][42 * 32 : 43 * 32, 17 * 32 : 18 * 32])
    assert (data / "inception" / "network.pth").read_bytes() == b"weights"
    assert not [*data.rglob("*.part")]

    (data / "inception" / "network.pth").write_bytes(b"of an earlier call")
    (folder / "inception" / "more.pth").touch()
    found.unpack(folder, data)
    assert (data / "inception" / "network.pth").read_bytes() == b"of an earlier call"
    shutil.rmtree(folder)
    assert all((data / name).exists() for name in ("inception/more.pth", "others/x.npy", "others/cat.webp"))
