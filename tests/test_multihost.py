"""Several real processes: one run however it is cut into processes, and whatever is killed when."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gddim import load_table
from gddim.checkpoint import Checkpointer
from gddim.data.pipeline import batch_indices
from gddim.parallel import EXIT_LOST, EXIT_PREEMPTED, MeshConfig, make_mesh, replicated

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("worker.py")
BATCH, RECORDS = 64, 1_000


class Job:
    """The processes of one run of tests/worker.py, of `devices` fake devices each."""

    def __init__(
        self, *words: object, processes: int = 2, devices: int = 4, logs: Path, records_until: int = 0, folders=()
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
            "RECORDS": str(logs),
            "RECORDS_UNTIL": str(records_until),
        }
        if processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
        for folder in (logs, *folders):
            folder.mkdir(exist_ok=True)
        self.logs = [logs / f"log-{i}-of-{processes}-{port}" for i in range(processes)]
        command = [sys.executable, str(WORKER), *map(str, words)]
        self.processes = [
            subprocess.Popen(
                command,
                env=env | {"JAX_PROCESS_ID": str(i)},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                cwd=folders[i] if folders else ROOT,
            )
            for i, log in enumerate(self.logs)
        ]

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit status of every process."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(end - time.monotonic()) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def said(self, process: int = 0) -> str:
        return self.logs[process].read_text()


def steps(workdir: Path) -> list[int]:
    return Checkpointer(workdir / "checkpoints").steps()


def manifest(workdir: Path, step: int, folder: str = "checkpoints") -> dict:
    """Shape, type and checksum of every array of a step, and the configuration."""
    return json.loads((workdir / folder / str(step) / "manifest" / "metadata").read_text())


def restore(folder: Path, step: int, mesh, names=("train", "ema")) -> dict:
    """The arrays of a step by name, on a mesh; raises unless every checksum is right."""
    sharding = replicated(mesh)
    items = json.loads((folder / str(step) / "manifest" / "metadata").read_text())["items"]
    asked = {
        name: {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for path, (shape, dtype, _) in items[name].items()
        }
        for name in names
    }
    return Checkpointer(folder).restore(asked, step)[0]


def read(logs: Path, process: int, processes: int) -> set[tuple[int, ...]]:
    """The shares of batches that a process read, in whatever order its threads read them."""
    return {tuple(json.loads(line)) for line in (logs / f"{process}-of-{processes}").read_text().splitlines()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes from start to end."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    job = Job("train", "--workdir", workdir, "--mesh.fsdp", 2, logs=workdir.parent / "logs")
    assert job.wait() == [0, 0], job.said()
    return workdir


def start(workdir: Path, *options: object, **how) -> Job:
    """Begin or continue a run, and return once it trains."""
    job = Job("train", "--workdir", workdir, *options, logs=workdir.parent / "logs", **how)
    while job.running() and "training from step" not in job.said():
        time.sleep(0.02)
    return job


def began_at(job: Job) -> int:
    return int(job.said().split("training from step ")[1].split()[0])


def kill_after(job: Job, seconds: float, rng: random.Random) -> None:
    """SIGKILL both processes, in any order, that long after training has begun."""
    time.sleep(seconds)
    for process in rng.sample(job.processes, 2):
        process.send_signal(signal.SIGKILL)
    job.wait()


@pytest.mark.slow
def test_a_run_survives_kills_and_preemption_bit_for_bit(undisturbed, tmp_path):
    workdir, options = tmp_path / "run", ("--mesh.fsdp", 2)
    job = start(workdir, *options)
    while job.running() and len(steps(workdir)) < 2:
        time.sleep(0.02)
    kill_after(job, 0.1, random.Random(0))  # most likely inside a save: there is one every 5 short steps
    known = max(steps(workdir))
    job = start(workdir, *options)
    assert began_at(job) == known
    signalled = time.monotonic()
    job.processes[1].terminate()
    assert job.wait() == [EXIT_PREEMPTED, EXIT_PREEMPTED], job.said()
    assert time.monotonic() - signalled < 10
    stopped = max(steps(workdir))
    assert known < stopped < 60
    assert f"saved at step {stopped} of 60" in job.said()
    job = start(workdir, *options)
    assert began_at(job) == stopped
    assert job.wait() == [0, 0], job.said()
    assert manifest(workdir, 60)["items"] == manifest(undisturbed, 60)["items"]
    ours, theirs = (restore(run / "checkpoints", 60, make_mesh()) for run in (workdir, undisturbed))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_another_number_of_processes_reads_the_same_records(undisturbed, tmp_path):
    workdir, logs = tmp_path / "run", tmp_path / "logs"
    shutil.copytree(undisturbed, workdir)
    job = Job("train", "--workdir", workdir, "--train.steps", 70, processes=1, devices=4, logs=logs)
    assert job.wait() == [0], job.said()
    assert began_at(job) == 60
    expected = [tuple(batch_indices(RECORDS, BATCH, 0, i).tolist()) for i in range(70)]
    half = BATCH // 2
    for process, share in enumerate((slice(half), slice(half, None))):
        assert {batch[share] for batch in expected[:60]} <= read(undisturbed.parent / "logs", process, 2)
    assert set(expected[60:]) <= read(logs, 0, 1)
    assert not set(expected[:60]) & read(logs, 0, 1)


def test_what_two_processes_saved_is_the_same_on_any_mesh(undisturbed):
    meshes = [make_mesh(MeshConfig(-1, fsdp), jax.devices()[:count]) for count, fsdp in ((1, 1), (4, 1), (8, 4))]
    first, *others = (restore(undisturbed / "checkpoints", 60, mesh) for mesh in meshes)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)


@pytest.mark.slow
def test_every_verb_gives_the_same_on_one_and_on_two_processes(undisturbed, tmp_path):
    options = ["--sampling.samples", 10, "--sampling.batch", 8, "--eval.samples", 20, "--eval.nfe", 4]
    options += ["--eval.features", "pixels", "--eval.samplers", "gddim:2:data", "em:lam=1"]
    fit = ["--sampling.nfe", 2, "--fit.steps", 25, "--fit.pairs", 16, "--fit.held-out", 8, "--fit.batch", 8]
    fit += ["--fit.teacher", 8, "--fit.minutes", 10_000]  # whose share of the rate is then nothing
    found = []
    for processes in (1, 2):
        workdir, logs = tmp_path / str(processes), tmp_path / "logs"
        shutil.copytree(undisturbed, workdir)
        for verb in ("sample", "evaluate", "likelihood", "encode"):
            job = Job(verb, "--workdir", workdir, *options, processes=processes, devices=4 // processes, logs=logs)
            assert job.wait() == [0] * processes, job.said()
        job = Job("fit", "--workdir", workdir, *fit, processes=processes, devices=4 // processes, logs=logs)
        assert job.wait() == [0] * processes, job.said()
        arrays = [np.load(workdir / name)["samples"] for name in ("samples.npz", "latents.npz")]
        arrays.append(load_table(workdir / "solvers" / "cld-2.npz").stored.table.weights)
        rows = [json.loads(line)["metrics"] for line in (workdir / "results.jsonl").read_text().splitlines()]
        bits = json.loads((workdir / "likelihood.json").read_text())["bits_per_dimension"]
        found.append((arrays, rows, bits))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *found)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    """Each restart continues from the newest whole step, at most an interval and a save in flight before the kill."""
    options = ("--train.steps", 400, "--train.report-every", 1)
    rng, workdir, kills = random.Random(1), tmp_path / "run", 0
    reached = known = 0
    while kills < 20:
        job = start(workdir, *options)
        assert job.running(), job.said()
        assert began_at(job) == known
        assert reached - known <= 10
        kill_after(job, rng.uniform(0, 3), rng)
        kills += 1
        reached = max([known, *(int(n) for n in re.findall(r"step (\d+)/400", job.said()))])
        known = max(steps(workdir), default=0)
    job = start(workdir, *options)
    assert job.wait() == [0, 0], job.said()
    calm = tmp_path / "calm" / "run"
    calm.parent.mkdir()
    assert Job("train", "--workdir", calm, *options, logs=tmp_path / "calm").wait() == [0, 0]
    assert manifest(workdir, 400)["items"] == manifest(calm, 400)["items"]


@pytest.mark.slow
def test_hosts_that_share_no_folder_are_told_so_before_training(tmp_path):
    """Relative paths in two working directories."""
    jobs = Job("train", "--workdir", "run", logs=tmp_path / "logs", folders=[tmp_path / "a", tmp_path / "b"])
    assert jobs.wait(120) == [2, 2], jobs.said()
    for process in (0, 1):
        assert "is not the same folder on all hosts: process(es) [1] see another one" in jobs.said(process)


@pytest.mark.slow
def test_hosts_with_other_records_are_told_so_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("RECORDS_LOST", "1")
    job = Job("train", "--workdir", tmp_path / "run", logs=tmp_path / "logs")
    assert job.wait(120) == [2, 2], job.said()
    for process in (0, 1):
        assert "are not the same on all hosts: process(es) [1] have others than process 0" in job.said(process)


@pytest.mark.slow
def test_every_process_of_a_job_may_load_a_run(undisturbed, tmp_path):
    job = Job("load", undisturbed, logs=tmp_path / "logs")
    assert job.wait(120) == [0, 0], job.said()
    assert all("loaded (2,)" in job.said(process) for process in (0, 1))


@pytest.mark.slow
def test_what_is_wrong_on_the_first_host_ends_all_alike(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    job = Job("train", "--workdir", workdir, "--seed", 5, logs=tmp_path / "logs")
    assert job.wait(120) == [2, 2], job.said()
    assert all("another configuration" in job.said(process) for process in (0, 1))


@pytest.mark.slow
def test_a_signal_to_all_while_sampling_ends_with_the_status_of_preemption(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    options = ["--eval.features", "pixels", "--eval.samples", 10_000_000, "--eval.batch", 64]
    job = Job("evaluate", "--workdir", workdir, *options, logs=tmp_path / "logs")
    time.sleep(25)
    assert job.running(), job.said()
    for process in job.processes:
        process.terminate()
    assert job.wait(30) == [EXIT_PREEMPTED, EXIT_PREEMPTED], job.said()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_ends_the_others_within_a_minute(tmp_path, lost):
    job = start(tmp_path / "run", "--train.steps", 100_000, "--train.save-every", 1_000)
    time.sleep(3)
    killed = time.monotonic()
    job.processes[lost].kill()
    assert job.processes[1 - lost].wait(timeout=90) == -signal.SIGABRT == 128 - EXIT_LOST
    assert time.monotonic() - killed < 60
    assert "another task died" in job.said(1 - lost)


@pytest.mark.slow
def test_an_error_on_one_host_ends_the_others_within_a_minute(tmp_path):
    job = start(tmp_path / "run", "--train.steps", 100_000, "--train.save-every", 1_000, records_until=200)
    assert job.processes[1].wait(timeout=120) == 1
    failed = time.monotonic()
    assert job.processes[0].wait(timeout=90) == -signal.SIGABRT
    assert time.monotonic() - failed < 60
    assert "the disk is on fire" in job.said(1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_stops_them_together(tmp_path, number):
    job = start(tmp_path / "run", "--train.steps", 100_000)
    time.sleep(3)
    for process in job.processes:
        process.send_signal(number)
    assert job.wait(60) == [EXIT_PREEMPTED, EXIT_PREEMPTED], job.said()
    assert f"saved at step {max(steps(tmp_path / 'run'))} of" in job.said()


@pytest.mark.slow
def test_windows_of_two_processes_end_at_the_same_step_and_are_one_run(tmp_path):
    workdir, ended = tmp_path / "run", []
    while 60 not in ended:
        options = ("--train.minutes", 0.002 + 0.01 * len(ended), "--train.save-every", 1_000, "--train.fused", 3)
        job = Job("train", "--workdir", workdir, "--mesh.fsdp", 2, *options, logs=tmp_path / "logs")
        statuses = job.wait(120)
        ended.append(max(steps(workdir)))
        assert statuses == [EXIT_PREEMPTED if ended[-1] < 60 else 0] * 2, job.said()
    assert len(ended) > 1
    whole = Job(
        *("train", "--workdir", tmp_path / "whole", "--mesh.fsdp", 2, "--train.fused", 3, "--train.save-every", 1_000),
        logs=tmp_path / "logs",
    )
    assert whole.wait() == [0, 0], whole.said()
    assert manifest(workdir, 60)["items"] == manifest(tmp_path / "whole", 60)["items"]


@pytest.mark.slow
def test_five_steps_of_a_unet_agree_however_they_are_cut(tmp_path):
    """Loss to 1e-6 and parameters to 1e-5, the states compared on one device."""
    cuts = {
        "one device": (1, 1, 1, 1, 1),  # processes, devices of each, data, fsdp, accumulate
        "8 data": (1, 8, 8, 1, 1),
        "8 fsdp": (1, 8, 1, 8, 1),
        "2 × 4": (1, 8, 2, 4, 1),
        "2 processes × 4": (2, 4, 2, 4, 1),
        "accumulated": (1, 1, 1, 1, 2),
    }
    found = {}
    for name, (processes, devices, *shape) in cuts.items():
        folder = tmp_path / name
        job = Job("five", folder, *shape, processes=processes, devices=devices, logs=tmp_path / "logs")
        assert job.wait(1_200) == [0] * processes, job.said()
        found[name] = manifest(folder, 5, "")["config"]["losses"], restore(folder, 5, make_mesh(), ("model", "ema"))
    losses, state = found["one device"]
    for other_losses, other in found.values():
        np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), other, state)
