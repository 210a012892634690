#!/usr/bin/env python3
"""One window of training on a borrowed machine that forgets everything, and what comes back of it in one small folder.

    python3 infra/window.py OUT --limit 9.5 --data DATA --wheels WHEELS --init STATE -- experiments.cifar10 --train.fused 8

It installs the wheels beside what the machine has, without a network; unpacks the data; measures for some minutes the laws with
products in float32 and in bfloat16, a profile, and what networks and their peers cost; trains; evaluates; and leaves in OUT, a
new folder, at most eight files of at most 16 MB:

    1-of-N.safetensors …   the state, with which `--init OUT` goes on elsewhere (python -m gddim.export)
    run.tar.gz             what each command said, profiles, configuration, curves, tables, samples
    window.json            commands, statuses and seconds

OUT is complete after each phase. With --limit all of it ends within so many minutes, and what there is no time for is left
out: training goes on until there is just time to save, and for --evaluate-minutes. SIGTERM ends what runs and keeps it, as the
end of the time does.

DATA is a folder with folders of data, as gddim finds them in $GDDIM_DATA. Where it has WebP atlases of CIFAR-10, labels.npz and
train_0.webp … train_4.webp, test.webp, each 100 × 100 images in the order of a file, they become cifar-10-batches-bin; of some
of them alone --data.batches 1 2 trains. What is packed as .xz is unpacked.

Calls that share --work on one machine go on in it, with the same --init, each with its own OUT. So where a call may bring only
so much, those before it bring parts of DATA and of WHEELS: --without measure train evaluate. Options of the experiment follow
its module; they are those of training and of evaluation. A state that has all its --train.steps is not trained any further: it
is evaluated.
"""

import argparse
import glob
import importlib
import json
import lzma
import math
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
PHASES = ("measure", "train", "evaluate")
PRECISIONS = ("float32", "bfloat16")
LABELS = "labels.npz"
ATLASES = {"test": "test_batch.bin"} | {f"train_{part}": f"data_batch_{part + 1}.bin" for part in range(5)}
COMES_BACK = ("config.json", "results.*", "ema", "solvers", "report.html", "samples.*", "classes.json", "tensorboard")
GRACE, SAVE, EXPORT, PACK = 20.0, 20.0, 40.0, 10.0  # seconds: to end when asked to; for these at the end of training
DEVICES = "/dev/nvidia[0-9]*"
SHARED_MEMORY = {"XLA_CLIENT_MEM_FRACTION": ".45"}  # where PyTorch needs some of the device's


class Window:
    """The phases of a window: each some commands with the packages of the wheels, their output kept in files."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.out, self.work = given, Path(given.out).resolve(), Path(given.work).resolve()
        self.workdir, self.site, self.logs = self.work / "run", self.work / "site", self.work / "logs"
        self.ends = time.monotonic() + 60 * given.limit
        self.stopped = False
        self.said: list[dict] = []
        module, *self.options = given.experiment
        self.experiment = ["-m", module]

    def stop(self, *_) -> None:
        self.stopped = True

    def left(self, kept: float = PACK) -> float:
        """Seconds until the limit, less those that are kept for what follows."""
        return self.ends - time.monotonic() - kept

    def python(
        self,
        name: str,
        *words: str,
        seconds: float,
        last: bool = False,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> int | None:
        """Run this interpreter on some words, and note its status; None where there is no time. Past its time it is asked to
        end, and soon made to, and also by a signal unless it is the last that has to be done."""
        command, began = [sys.executable, *words], time.monotonic()
        status, tail = None, ["no time is left"]
        print(f"== {name}: {shlex.join(command[1:])}", flush=True)
        if seconds > 0 and (last or not self.stopped):
            path = os.pathsep.join(filter(None, [str(ROOT), str(self.site), os.environ.get("PYTHONPATH")]))
            # a driver that does not work is an error, no slow run
            device = {"JAX_PLATFORMS": "cuda,cpu"} if glob.glob(DEVICES) else {}
            env = {**device, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})}
            file = self.logs / f"{name}.log"
            with file.open("wb") as log:
                child = subprocess.Popen(command, cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT)
                status = self.wait(child, began + seconds, last)
            tail = file.read_text(errors="replace").splitlines()[-8:]
        print(*tail, f"== {name}: status {status}", sep="\n", flush=True)
        took = round(time.monotonic() - began, 1)
        self.said.append({"name": name, "command": command[1:], "status": status, "seconds": took, "said": tail})
        return status

    def wait(self, child: subprocess.Popen, ends: float, last: bool) -> int:
        asked = math.inf
        while (status := child.poll()) is None:
            now = time.monotonic()
            if asked == math.inf and (now > ends or (self.stopped and not last)):
                child.terminate()
                asked = now
            elif now > asked + GRACE:
                child.kill()
            time.sleep(0.1)
        return status

    def set_up(self) -> None:
        """Wheels and data."""
        self.logs.mkdir(parents=True, exist_ok=True)
        if self.given.wheels:
            wheels = sorted(map(str, Path(self.given.wheels).glob("*.whl")))
            new = self.work / "new"  # pip would take away what other wheels have in the same folders
            shutil.rmtree(new, ignore_errors=True)
            pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(new))
            if self.python("wheels", *pip, *wheels, seconds=self.left()) != 0:
                sys.exit("infra/window.py: the wheels are not installed, see above")
            shutil.copytree(new, self.site, dirs_exist_ok=True)
        data = self.work / "data"
        if self.given.data:
            self.unpack(Path(self.given.data).resolve(), data)
        if data.exists():
            os.environ["GDDIM_DATA"] = str(data)
            print("data:", *sorted(str(path.relative_to(data)) for path in data.glob("*/*"))[:20], flush=True)

    def unpack(self, folder: Path, data: Path) -> None:
        """Official files from atlases and archives, and beside them what else is there; what is there already stays."""
        for path in sorted(folder.rglob("*")):
            file, unpacked = data / path.relative_to(folder), None
            if path.suffix == ".webp" and path.stem in ATLASES and path.with_name(LABELS).exists():
                file, unpacked = data / "cifar-10-batches-bin" / ATLASES[path.stem], self.records
            elif path.suffix == ".xz":
                file, unpacked = file.with_suffix(""), lambda path: lzma.decompress(path.read_bytes())
            if path.is_dir() or file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            if unpacked:
                part = file.with_suffix(".part")
                part.write_bytes(unpacked(path))
                part.rename(file)
            else:
                try:
                    os.link(path.resolve(), file)  # so that it outlasts the folder that it came in
                except OSError:
                    shutil.copyfile(path, file)

    def records(self, atlas: Path) -> bytes:
        """A file of CIFAR-10, whose reader knows its digest: of each image its class, then its planes."""
        if self.site.exists() and str(self.site) not in sys.path:
            sys.path.insert(0, str(self.site))
        np, image = importlib.import_module("numpy"), importlib.import_module("PIL.Image")
        known, part = np.load(atlas.with_name(LABELS)), atlas.stem.removeprefix("train_")
        classes = known["y_test"] if part == "test" else known["y_train"].reshape(5, -1)[int(part)]
        pixels = np.asarray(image.open(atlas).convert("RGB")).reshape(100, 32, 100, 32, 3)
        planes = pixels.transpose(0, 2, 4, 1, 3).reshape(10_000, 3072)
        return np.concatenate([classes.reshape(-1, 1).astype(np.uint8), planes], 1).tobytes()

    def measure(self) -> bool:
        """As much as there is time for, an equal share for each of what is left; its logs are kept, and profiles in `runs`."""
        check, bench = ("-m", "gddim.check", *self.given.laws), ("-m", "experiments.benchmark")
        by_precision = [(f"laws-{x}", {"JAX_DEFAULT_MATMUL_PRECISION": x}) for x in PRECISIONS]
        wanted = [(name, check, None, env) for name, env in by_precision if self.given.laws]
        wanted += [(x, (*bench, x), self.work, SHARED_MEMORY if x == "peers" else {}) for x in self.given.benchmark]
        ends, statuses = time.monotonic() + 60 * self.given.measure_minutes, []
        for number, (name, words, cwd, env) in enumerate(wanted):
            share = (ends - time.monotonic()) / (len(wanted) - number)
            seconds = min(share, self.left(PACK + GRACE))
            statuses.append(self.python(name, *words, seconds=seconds, cwd=cwd, env=env))
        return {*statuses} <= {0, None, -signal.SIGTERM}

    def train(self) -> bool:
        trained = self.training("train", self.given.minutes)
        return self.export() and trained if self.saved() else trained

    def training(self, name: str, minutes: float) -> bool:
        """Train for so many minutes, or until there is just time for what follows."""
        evaluation = 0.0 if "evaluate" in self.given.without else 60 * self.given.evaluate_minutes
        seconds = self.left(SAVE + EXPORT + evaluation + PACK)
        init = [f"--train.init={self.given.init}"] if self.given.init else []
        words = [f"--workdir={self.workdir}", f"--train.minutes={max(min(minutes, seconds / 60), 1e-6):.6f}", *init]
        seconds += SAVE * (seconds > 0)
        return self.python(name, *self.experiment, "train", *words, *self.options, seconds=seconds) in (0, PREEMPTED)

    def saved(self) -> bool:
        return any((self.workdir / "checkpoints").glob("[0-9]*"))

    def export(self) -> bool:
        """The state, with as many of Adam's moments as there is room for; also when all is to end."""
        folder, room = self.work / "state", min(1e6 * self.given.room - LOG_BYTES, (FILES - 2) * FILE_BYTES) / 1e6
        shutil.rmtree(folder, ignore_errors=True)
        words = ("-m", "gddim.export", str(self.workdir), str(folder), "--state", f"--room={room:.6f}")
        status = self.python("export", *words, seconds=max(self.left(), EXPORT / 2), last=True)
        for part in folder.iterdir() if status == 0 else ():
            shutil.move(part, self.out / part.name)
        return status == 0

    def evaluate(self) -> bool:
        words = [*self.experiment, "evaluate", f"--workdir={self.workdir}", *self.options]
        return self.python("evaluate", *words, seconds=self.left(PACK + GRACE)) in (0, PREEMPTED, None)

    def pack(self) -> None:
        """All but the state in two files."""
        told = {"command": sys.argv[1:], "phases": self.said}
        (self.out / "window.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        kept = [*self.logs.iterdir(), *(self.work / "runs").glob("*")]
        paths = [*kept, *(path for name in COMES_BACK for path in sorted(self.workdir.glob(name)))]
        archive, left_out = self.work / "run.tar.gz", []
        taken = sum(path.stat().st_size for path in self.out.iterdir() if path.name != archive.name)
        while paths:
            with tarfile.open(archive, "w:gz") as tar:
                for path in paths:
                    tar.add(path, path.relative_to(self.work))
            if archive.stat().st_size <= min(FILE_BYTES, 1e6 * self.given.room - taken):
                shutil.move(archive, self.out / archive.name)
                break
            largest = max(paths, key=lambda path: sum(p.stat().st_size for p in [path, *path.rglob("*")]))
            paths.remove(largest)
            left_out.append(largest.name)
        if left_out:
            print(f"infra/window.py: no room in run.tar.gz for {', '.join(left_out)}", flush=True)

    def run(self) -> list[str]:
        """The phases that are wanted; those that failed. What cannot train is known before anything is measured."""
        wanted, failed = [phase for phase in PHASES if phase not in self.given.without], []
        try:
            self.set_up()
            if {"measure", "train"} <= {*wanted} and not self.training("begin", 1e-6):
                return ["begin"]
            for phase in wanted:
                if phase == "evaluate" and "train" in failed and not self.saved():
                    continue
                self.pack()
                if not getattr(self, phase)():
                    failed.append(phase)
            return failed
        finally:
            self.pack()


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  # on any terminal
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="new or empty folder for what comes back")
    parser.add_argument("--limit", type=float, default=math.inf, help="minutes in which all of it ends (none)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training, compilation included (the rest)")
    parser.add_argument("--data", help="folder of folders of data (without it $GDDIM_DATA)")
    parser.add_argument("--wheels", help="folder of wheels (without it what is installed is used)")
    parser.add_argument("--init", help="OUT of the window before, or a run")
    parser.add_argument("--work", default="window", help="folder of the work, new or that of another call (window)")
    parser.add_argument(
        "--laws", nargs="*", default=["gddim:VP", "gddim:CLD"], help="of processes (gddim:VP gddim:CLD)"
    )
    names = ["networks", "peers"]
    parser.add_argument("--benchmark", nargs="*", default=names, help=f"of experiments.benchmark ({' '.join(names)})")
    parser.add_argument("--measure-minutes", type=float, default=4.0, help="of laws and benchmarks at most (4)")
    parser.add_argument("--evaluate-minutes", type=float, default=6.0, help="of --limit, kept for evaluation (6)")
    parser.add_argument("--room", type=float, default=67, help="MB that may come back in all (67)")
    parser.add_argument("--without", nargs="*", default=[], choices=PHASES, help="phases to leave out")
    parser.add_argument("experiment", nargs="+", help="after --: module of the experiment, and its options")
    given = parser.parse_args()
    out, work = Path(given.out), Path(given.work)
    for name in ("limit", "minutes"):
        if not getattr(given, name) > 0:
            parser.error(f"--{name} must be more than 0, not {getattr(given, name):g}")
    if given.room * 1e6 <= LOG_BYTES:
        parser.error(f"--room must be more than {LOG_BYTES / 1e6:g} MB, not {given.room:g}")
    if out.resolve() == work.resolve():
        parser.error(f"OUT and --work are one folder, {out}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} is there already: give a new or an empty folder")
    if work.exists() and (not work.is_dir() or (any(work.iterdir()) and not (work / "logs").is_dir())):
        parser.error(f"--work {work} holds something else: give a new folder, or that of another call")
    for name in ("init", "data", "wheels"):
        if (word := getattr(given, name)) and not Path(word).is_dir():
            parser.error(f"--{name} {word} is no folder")
    if given.wheels and not any(Path(given.wheels).glob("*.whl")):
        parser.error(f"--wheels {given.wheels} is a folder without a wheel")
    if "train" not in given.without and math.isinf(min(given.minutes, given.limit)):
        parser.error("give --minutes of training, or the --limit of all")
    out.mkdir(parents=True, exist_ok=True)
    window = Window(given)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, window.stop)
    failed = window.run()
    size = sum(path.stat().st_size for path in window.out.iterdir())
    print(f"{out}: {len([*out.iterdir()])} files, {size:,} bytes" + f"; failed: {', '.join(failed)}" * bool(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
