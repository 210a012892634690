#!/usr/bin/env python3
"""One window of training on a borrowed machine that forgets everything, and what comes back of it in one small folder.

    python3 infra/window.py OUT --minutes 20 --data DATA --wheels WHEELS --init STATE -- experiments.cifar10 --train.fused 8

It installs the wheels beside what the machine has, without a network; unpacks the data; measures the laws with products in
float32 and in bfloat16, and for some minutes what networks and their peers cost; trains; evaluates; and leaves in OUT, a new
folder, at most eight files of at most 16 MB:

    1-of-N.safetensors …   the state, with which `--init OUT` goes on elsewhere (python -m gddim.export)
    run.tar.gz             what each phase said, profiles, configuration, curves, tables, samples
    window.json            commands, statuses and seconds of the phases

DATA is a folder that holds cifar-10-batches-bin, or labels.npz and WebP atlases of it: train_0.webp … train_4.webp, test.webp,
each 100 × 100 images in the order of a file; of some of them alone --data.batches 1 2 trains. Calls that share --work on one
machine go on in it, each with its own OUT, and what was unpacked before stays. Options of the experiment follow its module;
they are those of each phase. A call trains at most --minutes, then comes what is left of the phases: mind a limit on calls.
"""

import argparse
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREEMPTED = 75
FILES, FILE_BYTES = 8, 16_000_000
LOG_BYTES = 2_000_000  # at least, for what is not the state
PHASES = ("laws", "benchmark", "train", "evaluate")
PRECISIONS = ("float32", "bfloat16")
COMES_BACK = ("config.json", "results.*", "report.html", "samples.*", "classes.json", "tensorboard")  # of the workdir


class Window:
    """The phases of a window: each a command with the packages of the wheels, its output kept in a file."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.out, self.work = given, Path(given.out).resolve(), Path(given.work).resolve()
        self.workdir, self.site, self.logs = self.work / "run", self.work / "site", self.work / "logs"
        self.phases: list[dict] = []
        module, *self.options = given.experiment
        self.experiment = ["-m", module]

    def python(self, name: str, *words: str, seconds: float | None = None, cwd: Path | None = None, **env: str) -> int:
        """Run this interpreter on some words; returns its status, and notes it. Past its time it is asked to end."""
        command, began = [sys.executable, *words], time.monotonic()
        path = os.pathsep.join(filter(None, [str(ROOT), str(self.site), os.environ.get("PYTHONPATH")]))
        print(f"== {name}: {shlex.join(command[1:])}", flush=True)
        with (self.logs / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **env},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                status = child.wait(seconds)
            except subprocess.TimeoutExpired:
                child.terminate()
                status = child.wait()
        tail = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-8:]
        print(*tail, f"== {name}: status {status}", sep="\n", flush=True)
        took = round(time.monotonic() - began, 1)
        self.phases.append({"name": name, "command": command[1:], "status": status, "seconds": took, "said": tail})
        return status

    def set_up(self) -> None:
        """Wheels and data."""
        self.logs.mkdir(parents=True, exist_ok=True)
        wheels = sorted(map(str, Path(self.given.wheels).glob("*.whl"))) if self.given.wheels else []
        if wheels and not self.site.exists():
            pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(self.site))
            if self.python("wheels", *pip, *wheels):
                shutil.rmtree(self.site, ignore_errors=True)
                sys.exit("infra/window.py: the wheels do not install, see above")
        if self.given.data:
            self.data(Path(self.given.data).resolve())

    def data(self, folder: Path) -> None:
        """Official files from atlases; what else is there, as the Inception network, is linked beside them."""
        atlases = sorted(folder.glob("*.webp"))
        if not atlases:
            os.environ["GDDIM_DATA"] = str(folder)
            return
        data = self.work / "data"
        os.environ["GDDIM_DATA"] = str(data)
        if self.site.exists():
            sys.path.insert(0, str(self.site))
        np, image = importlib.import_module("numpy"), importlib.import_module("PIL.Image")
        (data / "cifar-10-batches-bin").mkdir(parents=True, exist_ok=True)
        labels = np.load(folder / "labels.npz")
        for atlas in atlases:
            part = atlas.stem.removeprefix("train_")
            if part == "test":
                name, classes = "test_batch.bin", labels["y_test"]
            else:
                name, classes = f"data_batch_{int(part) + 1}.bin", labels["y_train"].reshape(5, -1)[int(part)]
            pixels = np.asarray(image.open(atlas).convert("RGB")).reshape(100, 32, 100, 32, 3)
            planes = pixels.transpose(0, 2, 4, 1, 3).reshape(10_000, 3072)
            raw = np.concatenate([classes.reshape(-1, 1).astype(np.uint8), planes], 1)
            (data / "cifar-10-batches-bin" / name).write_bytes(raw.tobytes())  # its reader knows the official digest
        for other in folder.iterdir():
            if other.is_dir() and not (data / other.name).exists():
                (data / other.name).symlink_to(other)

    def laws(self) -> bool:
        statuses = [
            self.python(
                f"laws-{precision}", "-m", "gddim.check", *self.given.laws, JAX_DEFAULT_MATMUL_PRECISION=precision
            )
            for precision in PRECISIONS
        ]
        return not any(statuses)

    def benchmark(self) -> bool:
        """As much as there is time for: what was measured is in what it says, profiles are in `runs`."""
        words, seconds = ("experiments.benchmark", "profile", "networks", "peers"), 60 * self.given.benchmark_minutes
        return self.python("benchmark", "-m", *words, seconds=seconds, cwd=self.work) in (0, -signal.SIGTERM)

    def train(self) -> bool:
        began = (self.workdir / "config.json").exists()
        init = [f"--train.init={self.given.init}"] if self.given.init else []
        words = [*self.experiment, "train", f"--workdir={self.workdir}", f"--train.minutes={self.given.minutes}"]
        status = self.python("train", *words, *init, *self.options)
        trained = status in (0, PREEMPTED) and (began or (self.workdir / "checkpoints").exists())
        return self.export() and trained

    def export(self) -> bool:
        """The state, with as many of Adam's moments as there is room for."""
        most = 1e6 * self.given.room - LOG_BYTES
        for moments in ("both", "second", "none"):
            folder = self.work / "state"
            shutil.rmtree(folder, ignore_errors=True)
            if self.python(
                "export", "-m", "gddim.export", str(self.workdir), str(folder), "--state", f"--moments={moments}"
            ):
                return False
            parts = [*folder.iterdir()]
            if len(parts) <= FILES - 2 and sum(part.stat().st_size for part in parts) <= most:
                for part in parts:
                    shutil.move(part, self.out / part.name)
                return True
        print(f"infra/window.py: the state has no room in {self.given.room} MB, and stays in {folder}", flush=True)
        return False

    def evaluate(self) -> bool:
        words = [*self.experiment, "evaluate", f"--workdir={self.workdir}", *self.options]
        status = self.python("evaluate", *words, seconds=60 * self.given.evaluate_minutes or None)
        return status in (0, PREEMPTED)

    def pack(self) -> None:
        """All but the state in two files."""
        told = {"command": sys.argv[1:], "phases": self.phases}
        (self.out / "window.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        profiles = (self.work / "runs").glob("*")
        paths = [
            *self.logs.iterdir(),
            *profiles,
            *(path for name in COMES_BACK for path in sorted(self.workdir.glob(name))),
        ]
        left_out, taken = [], sum(path.stat().st_size for path in self.out.iterdir())
        most = min(FILE_BYTES, 1e6 * self.given.room - taken)
        while paths:
            archive = self.out / "run.tar.gz"
            with tarfile.open(archive, "w:gz") as tar:
                for path in paths:
                    tar.add(path, path.relative_to(self.work))
            if archive.stat().st_size <= most:
                break
            largest = max(paths, key=lambda path: sum(p.stat().st_size for p in [path, *path.rglob("*")]))
            paths.remove(largest)
            left_out.append(largest.name)
        if left_out:
            print(f"infra/window.py: no room in run.tar.gz for {', '.join(left_out)}", flush=True)


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  # on any terminal
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="new or empty folder for what comes back")
    parser.add_argument("--minutes", type=float, required=True, help="of training, compilation included")
    parser.add_argument("--data", help="folder of the data (without it $GDDIM_DATA)")
    parser.add_argument("--wheels", help="folder of wheels (without it what is installed is used)")
    parser.add_argument("--init", help="OUT of the window before, or a run")
    parser.add_argument("--work", default="window", help="folder of the work (window)")
    parser.add_argument("--laws", nargs="*", default=[], help="processes, as gddim:CLD, whose laws are measured (all)")
    parser.add_argument("--benchmark-minutes", type=float, default=4.0, help="of the benchmark at most (4)")
    parser.add_argument("--evaluate-minutes", type=float, default=0.0, help="of evaluation at most (no limit)")
    parser.add_argument("--room", type=float, default=67, help="MB that may come back in all (67)")
    parser.add_argument("--without", nargs="*", default=[], choices=PHASES, help="phases to leave out")
    parser.add_argument("experiment", nargs="+", help="after --: module of the experiment, and its options")
    given = parser.parse_args()
    out = Path(given.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} is there already: give a new or an empty folder")
    if given.init and not Path(given.init).is_dir():
        parser.error(f"--init {given.init} is no folder")
    if given.data and not Path(given.data).is_dir():
        parser.error(f"--data {given.data} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    window = Window(given)
    window.set_up()
    failed = []
    for phase in PHASES:
        if phase not in given.without and not getattr(window, phase)():
            failed.append(phase)
    window.pack()
    size = sum(path.stat().st_size for path in window.out.iterdir())
    print(f"{out}: {len([*out.iterdir()])} files, {size:,} bytes" + f"; failed: {', '.join(failed)}" * bool(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
