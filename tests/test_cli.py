"""The command line of an experiment: what it accepts, what it says, and what it leaves behind when it is killed."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import status_of

from experiments import cld_cifar10, cld_digits, points, points_vp
from gddim.checkpoint import Checkpointer
from gddim.data import ImageFolder
from gddim.experiment.cli import execute, parse
from gddim.experiment.plan import Plan
from gddim.experiment.workdir import describe

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("--train.steps=24", "--train.batch=16", "--train.warmup=4", "--train.save-every=8", "--train.report-every=4"),
    *("--net.width=16", "--net.depth=1", "--data.train-points=100", "--data.test-points=50"),
    *("--sampling.samples=8", "--sampling.batch=8", "--sampling.nfe=3", "--eval.samples=8", "--eval.batch=8"),
    *("--eval.nfe", "3", "--eval.samplers", "gddim:2", "em"),
]  # fmt: skip


def test_options_set_the_fields_of_every_level():
    command = parse(
        points.EXPERIMENT,
        ["train", "--workdir=w", "--sde.m-inv=3", "--train.steps", "7", "--sampler=heun", "--mesh.fsdp=2", "--seed=5"],
    )
    assert (command.verb, command.workdir, command.dry_run) == ("train", "w", False)
    experiment = command.experiment
    assert (experiment.sde.m_inv, experiment.train.steps, experiment.mesh.fsdp, experiment.seed) == (3.0, 7, 2, 5)
    assert type(experiment.sampling.sampler).__name__ == "Heun"
    assert dataclasses.replace(experiment.train, steps=points.EXPERIMENT.train.steps) == points.EXPERIMENT.train


def test_without_arguments_it_is_the_experiment_as_written():
    command = parse(points.EXPERIMENT, [])
    assert (command.verb, command.workdir, command.dry_run) == ("run", "runs/points", False)
    assert describe(command.experiment) == describe(points.EXPERIMENT)


@pytest.mark.parametrize("module", [points, points_vp, cld_digits, cld_cifar10], ids=lambda m: m.EXPERIMENT.name)
def test_help_documents_every_option(module, capsys):
    assert status_of(module.EXPERIMENT, "--help") == 0
    said = capsys.readouterr().out
    options = [each.split("(default")[0].split() for each in re.split(r"^ *[│|]? *(?=--\w)", said, flags=re.MULTILINE)]
    assert len(options) > 45
    assert not [words for words in options if not any(word.strip(".,").isalpha() and word.islower() for word in words)]


def test_a_size_that_the_network_cannot_halve_is_refused(tmp_path, capsys):
    argv = [f"--workdir={tmp_path / 'w'}", "--net.multipliers", "1", "1", "1", "1", "1"]
    assert status_of(cld_digits.EXPERIMENT, *argv) == 2
    assert "sides must be multiples of 16; got 8x8" in capsys.readouterr().err


def test_missing_data_is_said_before_anything_is_written(tmp_path, capsys):
    argv = [f"--workdir={tmp_path / 'w'}", f"--data.root={tmp_path / 'nowhere'}", "--net.width=8", "--net.blocks=1"]
    assert status_of(cld_cifar10.EXPERIMENT, *argv) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("what", ["file", "foreign folder", "foreign config", "broken config"])
def test_a_workdir_that_is_something_else_is_refused_and_left_alone(what, tmp_path, capsys):
    workdir = tmp_path / "w"
    if what == "file":
        workdir.write_text("mine")
    else:
        workdir.mkdir()
        name, text = {"foreign folder": ("thesis.tex", "x"), "foreign config": ("config.json", '{"a": 1}')}.get(
            what, ("config.json", "{")
        )
        (workdir / name).write_text(text)
    before = {path: path.read_text() for path in [workdir, *workdir.glob("*")] if path.is_file()}
    assert status_of(points.EXPERIMENT, f"--workdir={workdir}", *SMALL) == 2
    said = capsys.readouterr().err
    assert str(workdir) in said
    assert said.count("\n") == 1
    assert {path: path.read_text() for path in [workdir, *workdir.glob("*")] if path.is_file()} == before


@pytest.mark.parametrize("module", [points, cld_digits], ids=lambda m: m.EXPERIMENT.name)
def test_a_dry_run_tells_the_size_and_writes_nothing(module, tmp_path, capsys):
    workdir = tmp_path / "w"
    assert status_of(module.EXPERIMENT, f"--workdir={workdir}", "--dry-run") == 0
    said = capsys.readouterr().out
    count = sum(x.size for x in jax.tree.leaves(Plan(module.EXPERIMENT).init().model))
    assert f"parameters: {count:,}\n" in said
    for words in ("devices: 8 × cpu", "mesh: data 8, fsdp 1", "batch per device: ", "checkpoint: about ", "FLOPs per"):
        assert words in said
    assert not workdir.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    execute(parse(points.EXPERIMENT, [f"--workdir={workdir}", *SMALL, "--train.show-every=16"]))
    return workdir


def test_a_run_leaves_samples_pictures_and_a_table(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        *("config.json", "checkpoints", "tensorboard", "samples.npz", "samples.png", "trajectory.png", "denoise.png"),
        *("trajectory.svg", "trajectory.pdf", "report.html", "results.jsonl", "results.md"),
        *("results.png", "results.svg", "results.pdf"),
    }
    assert {path.stem for path in (trained / "training").iterdir()} == {"00000016"}  # while it trained
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 24
    assert Checkpointer(trained / "checkpoints").steps() == [8, 16, 24]
    with np.load(trained / "samples.npz", allow_pickle=False) as file:
        assert file["samples"].shape == (8, 2)
        assert json.loads(str(file["gddim"]))["step"] == 24
    rows = [json.loads(line) for line in (trained / "results.jsonl").read_text().splitlines()]
    assert [(row["cell"]["sampler"], row["cell"]["nfe"]) for row in rows] == [("data", 0), ("gddim:2", 3), ("em", 3)]


def test_a_finished_run_is_neither_trained_nor_evaluated_again(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in (trained / "checkpoints").rglob("*")}
    table = (trained / "results.jsonl").read_text()
    execute(parse(points.EXPERIMENT, [f"--workdir={trained}", *SMALL]))
    assert "trained already: 24 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (trained / "checkpoints").rglob("*")} == before
    assert (trained / "results.jsonl").read_text() == table


def test_another_configuration_is_refused_with_a_line_for_each_difference(trained, capsys):
    before = (trained / "config.json").read_text()
    argv = [f"--workdir={trained}", *SMALL, "--net.width=32", "--sde.gamma=0.1"]
    for verb in ("train", "sample"):
        assert status_of(points.EXPERIMENT, verb, *argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[1:] == [
            "  net.width: the run has 16, this command 32",
            "  sde.gamma: the run has 0.04, this command 0.1",
        ]
    assert (trained / "config.json").read_text() == before


def test_steps_logging_sampling_and_evaluation_may_change(trained, capsys):
    argv = [f"--workdir={trained}", *SMALL, "--sampling.nfe=4", "--train.report-every=2", "--eval.samples=9"]
    execute(parse(points.EXPERIMENT, ["sample", *argv]))
    assert "NFE 4" in capsys.readouterr().out
    with np.load(trained / "samples-1.npz", allow_pickle=False) as file:
        assert json.loads(str(file["gddim"]))["nfe"] == 3, "earlier samples are kept"


def test_an_earlier_checkpoint_can_be_sampled(trained, capsys):
    execute(parse(points.EXPERIMENT, ["sample", f"--workdir={trained}", *SMALL, "--step=8"]))
    assert "samples of step 8 by gddim:3:free:data@tuned: NFE 3" in capsys.readouterr().out
    assert status_of(points.EXPERIMENT, "sample", f"--workdir={trained}", *SMALL, "--step=9") == 2
    assert "no whole checkpoint of step 9" in capsys.readouterr().err


def test_a_file_of_somebody_else_is_not_overwritten(trained, capsys):
    mine = trained / "denoise.png"
    ours = mine.read_bytes()
    mine.write_bytes(b"mine")
    assert status_of(points.EXPERIMENT, "sample", f"--workdir={trained}", *SMALL) == 2
    assert "denoise.png was not written by this program" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine"
    mine.write_bytes(ours)


def test_sampling_needs_a_run(tmp_path, capsys):
    assert status_of(points.EXPERIMENT, "sample", f"--workdir={tmp_path / 'w'}", *SMALL) == 2
    assert "holds no run: train it first" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


class Process:
    """`python -m experiments.points VERB` on one device, perhaps with a patch that runs before it."""

    def __init__(self, workdir: Path, *argv: str, patch: str = "", verb: str = "train"):
        code = f"{patch}\nfrom experiments.points import EXPERIMENT, main\nmain(EXPERIMENT)"
        environment = os.environ | {"XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, verb, f"--workdir={workdir}", *SMALL, *argv],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def line(self, words: str) -> None:
        """Wait until a line with these words is printed."""
        for line in self.process.stdout or []:
            if words in line:
                return
        raise AssertionError(f"ended without {words!r}: {self.process.stderr and self.process.stderr.read()}")

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


KILL = "import os, signal; die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
BEFORE_STEP = f"""{KILL}
import gddim.experiment.verbs.train as training
group = training._group
def _group(*arguments):
    for i, rows in enumerate(group(*arguments)):
        die() if i == {{}} else None
        yield rows
training._group = _group"""
IN_SAVE = f"""{KILL}
import gddim.checkpoint
save = gddim.checkpoint.Checkpointer.save
gddim.checkpoint.Checkpointer.save = lambda *arguments: (save(*arguments), die())"""
AT_COMMIT = f"""{KILL}
import orbax.checkpoint._src.path.atomicity as atomicity
atomicity.AtomicRenameTemporaryPath.finalize = die"""
SAY_WHEN_SWEEPING = """
import gddim.experiment.verbs.evaluate as evaluating
sweep = evaluating.sweep
evaluating.sweep = lambda *arguments, **options: print("sweeping", flush=True) or sweep(*arguments, **options)"""


def parameters(workdir: Path) -> list[np.ndarray]:
    argv = [f"--workdir={workdir}", *SMALL]
    plan = Plan(parse(points.EXPERIMENT, argv).experiment)
    items, step = Checkpointer(workdir / "checkpoints").restore({"ema": plan.shapes.ema})
    assert step == 24
    return [np.asarray(leaf) for leaf in jax.tree.leaves(items["ema"])]


def test_a_run_killed_anywhere_ends_with_the_very_parameters_of_one_that_was_not(tmp_path):
    whole = Process(tmp_path / "whole")
    for patch in (BEFORE_STEP.format(5), IN_SAVE, AT_COMMIT, BEFORE_STEP.format(12)):
        status, said = Process(tmp_path / "killed", patch=patch).end()
        assert status == -signal.SIGKILL, said
    assert Process(tmp_path / "killed").end() == (0, "")
    assert whole.end() == (0, "")
    for ours, theirs in zip(parameters(tmp_path / "killed"), parameters(tmp_path / "whole"), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_signal_saves_the_step_and_the_same_command_continues(tmp_path):
    long = ("--train.steps=1000000", "--train.report-every=1")
    running = Process(tmp_path / "w", *long)
    running.line("step 20/")
    locked_out, said = Process(tmp_path / "w", *long).end()
    assert (locked_out, said) == (
        2,
        f"error: --workdir {tmp_path / 'w'} is in use by another run: wait for it, or give another\n",
    )
    running.process.send_signal(signal.SIGTERM)
    status, said = running.end()
    assert status == 75
    found = re.search(r"saved at step (\d+) of 1000000; to continue: python .*--workdir=", said)
    assert found, said
    assert Checkpointer(tmp_path / "w" / "checkpoints").steps()[-1] == int(found[1])
    again = Process(tmp_path / "w", *long)
    again.line(f"training from step {found[1]} ")
    again.process.send_signal(signal.SIGINT)
    assert again.end()[0] == 75


def test_two_interrupts_end_a_run_in_a_line(tmp_path):
    running = Process(tmp_path / "w", "--train.steps=1000000", "--train.report-every=1", "--train.save-every=5")
    running.line("step 20/")
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.03)
    running.process.send_signal(signal.SIGINT)
    status, said = running.end()
    assert status in (75, 130)
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(("saved at step", "interrupted; the same command continues"))


def test_a_signal_while_a_table_is_made_ends_with_the_status_of_preemption(trained):
    running = Process(trained, "--eval.samples=10000000", patch=SAY_WHEN_SWEEPING, verb="evaluate")
    running.line("sweeping")
    running.process.send_signal(signal.SIGTERM)
    status, said = running.end()
    assert status == 75
    assert "what is done is kept" in said


def test_a_run_that_saved_nothing_may_be_corrected(tmp_path, capsys):
    status, _ = Process(tmp_path / "w", "--train.learning-rate=1e30").end()
    assert status == 1
    assert status_of(points.EXPERIMENT, "train", f"--workdir={tmp_path / 'w'}", *SMALL) == 0
    assert status_of(points.EXPERIMENT, "train", f"--workdir={tmp_path / 'w'}", *SMALL, "--seed=1") == 2
    assert "another configuration" in capsys.readouterr().err
    assert status_of(points.EXPERIMENT, "sample", f"--workdir={tmp_path / 'w'}", *SMALL, "--seed=1") == 0


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line(tmp_path):
    status, said = Process(tmp_path / "w", "--train.learning-rate=1e30").end()
    assert status == 1
    assert re.fullmatch(r"error: not finite at step \d+: loss .*; the checkpoints before it are untouched\n", said), (
        said
    )
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_a_dry_run_tells_that_the_data_are_absent(tmp_path, capsys):
    experiment = dataclasses.replace(cld_digits.EXPERIMENT, data=ImageFolder(str(tmp_path / "no"), 8, channels=1))
    for path, says in (
        (tmp_path / "no", f"data: absent: {tmp_path / 'no'} does not exist"),
        (tmp_path, f"data: {tmp_path}"),
    ):
        assert status_of(experiment, f"--workdir={tmp_path / 'w'}", "--dry-run", f"--data.path={path}") == 0
        assert says in capsys.readouterr().out.splitlines()
