"""infra/run against a pretended Python (no network), the pins, the image and the scripts' hygiene."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = [Requirement(line) for line in (ROOT / "infra" / "constraints.txt").read_text().splitlines() if line[0] != "#"]

# Knows the calls that infra/run makes and notes those that change something.
PYTHON = """#!/bin/sh
case "$*" in
*sys.version.split*) echo "$FAKE_VERSION" ;;
*ensurepip*) [ -z "${FAKE_OLD:-}" ] ;;
*fcntl*) exec REAL "$@" ;;
"-m venv"*) echo "venv $*" >>"$LOG"; mkdir -p "$4/bin"; rm -f "$4"/gddim-stamp*; cp "$0" "$4/bin/python" ;;
"-m pip"*) echo "pip $*" >>"$LOG"; sleep "${FAKE_SECONDS:-0}"; exit "${FAKE_PIP:-0}" ;;
--version) echo "Python $FAKE_VERSION" ;;
*) exit 99 ;;
esac
"""


class Checkout:
    """A copy of what infra/run reads, with a pretended `python3` before everything else on PATH."""

    def __init__(self, folder: Path):
        self.root, self.log, bin_ = folder / "check out", folder / "log", folder / "bin"
        (self.root / "infra").mkdir(parents=True)
        for name in ("pyproject.toml", "infra/run", "infra/constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        bin_.mkdir()
        for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
            (bin_ / name).write_text(PYTHON.replace("REAL", sys.executable))
            (bin_ / name).chmod(0o755)
        self.env = {"PATH": f"{bin_}:/usr/bin:/bin", "LOG": str(self.log), "FAKE_VERSION": "3.12.1"}
        self.cwd = folder

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        words = [self.root / "infra" / "run", *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, env=self.env | env, cwd=self.cwd, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, *command: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*command, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def changes(self) -> list[str]:
        """What was made since the last call: "venv" and "pip EXTRAS", in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [re.sub(r"^pip .*\[all,(.*)\]$", r"pip \1", line) if line[0] == "p" else "venv" for line in lines]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_run_sets_up_once_and_passes_everything_on(checkout):
    status, out, err = checkout.run("sh", "-c", 'echo "$1|$PWD"; command -v python; exit 7', "_", "a  b")
    assert status == 7
    assert out.splitlines() == [f"a  b|{checkout.cwd}", str(checkout.root / ".venv" / "bin" / "python")]
    assert "this takes half a minute or more, once" in err
    line = checkout.log.read_text().splitlines()[1]
    assert f"-c {checkout.root}/infra/constraints.txt -e {checkout.root}[all,test]" in line
    assert checkout.changes() == ["venv", "pip test"]

    start = time.perf_counter()
    assert checkout.run("true") == (0, "", "")
    assert time.perf_counter() - start < 0.5
    assert checkout.changes() == []


def test_run_installs_again_only_when_something_changed(checkout):
    checkout.run("true")
    checkout.changes()
    for name in ("pyproject.toml", "infra/constraints.txt"):
        with open(checkout.root / name, "a") as file:
            file.write("\n# changed\n")
        checkout.run("true")
        assert checkout.changes() == ["pip test"], name
    checkout.run("true", GDDIM_EXTRAS="cuda")
    assert checkout.changes() == ["pip test,cuda"]
    checkout.run("true")
    assert checkout.changes() == []  # what is installed stays
    checkout.run("true", GDDIM_EXTRAS="gcs", FAKE_OLD="1")  # needs no other interpreter than that of .venv
    assert checkout.changes() == ["pip test,cuda,gcs"]
    checkout.run("true", FAKE_VERSION="3.13.0")
    assert checkout.changes() == ["venv", "pip test,cuda,gcs"]
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.run("true", FAKE_VERSION="3.13.0")
    assert checkout.changes() == ["venv", "pip test,cuda,gcs"]


def test_run_starts_afresh_after_an_interruption(checkout):
    status, _, err = checkout.run("true", FAKE_PIP="1")
    assert status == 2
    assert "the installation failed" in err
    checkout.changes()
    process = checkout.start("true", FAKE_SECONDS="30")
    while not (checkout.log.exists() and "pip" in checkout.log.read_text()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    checkout.changes()
    assert checkout.run("true")[0] == 0
    assert checkout.changes() == ["venv", "pip test"]
    assert checkout.run("true", GDDIM_EXTRAS="test,cuda", FAKE_PIP="1")[0] == 2  # broken off while bringing up to date
    checkout.changes()
    assert checkout.run("true")[0] == 0
    assert checkout.changes() == ["venv", "pip test"]


def test_two_at_once_install_once(checkout):
    both = [checkout.start("echo", "done", FAKE_SECONDS="0.5") for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["done\n", "done\n"]
    assert checkout.changes() == ["venv", "pip test"]


def test_run_says_what_is_missing(checkout):
    status, out, err = checkout.run("true", FAKE_OLD="1")
    assert (status, out) == (2, "")
    assert err.startswith("infra/run: no Python 3.11 or newer with venv found as: python3 python3.13")
    assert err.count("\n") == 1
    status, _, err = checkout.run("true", GDDIM_PYTHON="no-such-python")
    assert status == 2
    assert "found as: no-such-python" in err
    status, _, err = checkout.run("true", GDDIM_EXTRAS="cuda,gpu")
    assert (status, err) == (2, f"infra/run: GDDIM_EXTRAS: no extra gpu; there are {' '.join(EXTRAS)}\n")
    status, _, err = checkout.run()
    assert (status, err) == (2, "infra/run: give a command, for example: ./infra/run pytest\n")


def test_every_requirement_has_one_exact_pin_for_each_python():
    direct = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    pinned = {pin.name.lower() for pin in PINS}
    assert {Requirement(line).name.lower() for line in direct} - {"gddim"} <= pinned  # itself, with its extras
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.url for pin in PINS)
    for python in ("3.11", "3.12", "3.13"):
        names = [p.name for p in PINS if p.marker is None or p.marker.evaluate({"python_version": python})]
        assert len(names) == len(set(names))
        assert {"jax", "jaxlib"} <= set(names)


def test_the_package_knows_its_version():
    import gddim

    assert version("gddim") == gddim.__version__
    assert (ROOT / "gddim" / "py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_scripts_are_sound():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    scripts = ["infra/run", "infra/slurm.sh", ".ci/run"]
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("accelerator", "extras", "lines"),
    [("cpu", "", []), ("cuda", "", ["jax[cuda12]"]), ("tpu", "gcs,all", ["jax[tpu]", "etils[epath-gcs]"])],
)
def test_requirements_of_the_image(accelerator, extras, lines):
    program = [sys.executable, "infra/requirements.py", "pyproject.toml", accelerator, extras]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["eval"], *lines]


@pytest.mark.parametrize("words", [("gpu", ""), ("cpu", "gsc")])
def test_the_image_refuses_what_it_does_not_know(words):
    program = [sys.executable, "infra/requirements.py", "pyproject.toml", *words]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "give" in done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "README.md"])
def test_docker_lines_make_the_folder_first_and_reach_a_tpu(name):
    text = (ROOT / name).read_text()
    assert text.index("mkdir -p runs") < text.index('docker run --init -v "$PWD/runs')
    assert "--privileged --network host --user root" in text


def test_the_image_is_pinned_cached_and_not_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if re.match("[A-Z]", line)]
    kinds = [kind for kind, _ in steps]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", dict(steps)["FROM"])
    assert dict(steps)["USER"] == "1000"
    assert dict(steps)["CMD"] == '["python", "-m", "experiments.cld_digits"]'
    # The dependencies are installed from files that an edit of the program does not touch.
    last_run = max(i for i, kind in enumerate(kinds) if kind == "RUN")
    before = " ".join(words for kind, words in steps[:last_run] if kind == "COPY")
    assert "pyproject.toml" in before
    assert "gddim" not in before
    copied = re.findall(r"(?:infra/)?[\w.]+(?= |$)", " ".join(w.rsplit(" ", 1)[0] for k, w in steps if k == "COPY"))
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)


LAUNCHERS = {
    "gke": ["run", "--image=é", "--gpu=é"],
    "gpu": [],
    "tpu": ["run", "é", "--project=p", "--zone=z", "--type=v4-8"],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_terminal_without_the_letters_gets_what_a_launcher_prints(name):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for words in (["--help"], [*LAUNCHERS[name], "--dry-run", "--", "python", "é"]):
        script = [sys.executable, ROOT / "infra" / f"{name}.py"]
        done = subprocess.run([*script, *words], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: " in done.stdout or "python" in done.stdout
