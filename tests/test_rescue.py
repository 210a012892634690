"""A run's checkpoints put to use: a new run that begins with one, and what is made of them while it trains."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from experiments import points
from gddim.checkpoint import Checkpointer
from gddim.experiment.cli import execute, main, parse
from gddim.experiment.workdir import reserved

WORDS = [
    *("--train.batch=16", "--train.warmup=4", "--train.save-every=4", "--train.report-every=4"),
    *("--net.depth=1", "--data.train-points=100", "--data.test-points=50"),
    *("--sampling.samples=8", "--sampling.batch=8", "--sampling.nfe=3", "--eval.samples=8", "--eval.batch=8"),
    *("--eval.nfe", "3", "--eval.samplers", "gddim:2"),
]  # fmt: skip


def words(verb: str, workdir: Path, *more: str) -> list[str]:
    return [
        verb,
        f"--workdir={workdir}",
        *WORDS,
        *(() if any("width" in word for word in more) else ["--net.width=16"]),
        *more,
    ]


def do(verb: str, workdir: Path, *more: str) -> None:
    execute(parse(points.EXPERIMENT, words(verb, workdir, *more)))


def refused(capsys, verb: str, workdir: Path, *more: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(points.EXPERIMENT, words(verb, workdir, *more))
    return capsys.readouterr().err


def sums(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_text())["items"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "w"
    do("train", workdir, "--train.steps=16", "--train.keep=9")
    return workdir


def test_a_new_run_goes_on_from_a_checkpoint_of_another_as_that_one_did(trained, tmp_path, capsys):
    do("train", tmp_path / "w", "--train.steps=16", f"--train.init={trained}@8")
    assert (
        f"from {trained}, step 8: nothing is changed\ntraining from step 8 to 16 on 100 records"
        in capsys.readouterr().out
    )
    assert Checkpointer(tmp_path / "w" / "checkpoints").steps() == [12, 16]
    assert sums(tmp_path / "w", 16) == sums(trained, 16)


def test_what_the_new_run_changes_is_told_and_changes_it(trained, tmp_path, capsys):
    new = ("--train.steps=20", f"--train.init={trained}", "--train.learning-rate=1e-5", "--train.clip=0.1", "--seed=3")
    do("train", tmp_path / "w", *new)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith(f"from {trained}, step 16: "))
    for change in ("seed: the run has 0, this command 3", "train.clip: the run has 1.0, this command 0.1"):
        assert change in line
    assert "train.learning_rate: " in line
    assert "train.steps: the run has 16, this command 20" in line
    assert "save_every" not in line
    shutil.copytree(trained, tmp_path / "other")
    do("train", tmp_path / "other", "--train.steps=20")
    assert sums(tmp_path / "w", 20) != sums(tmp_path / "other", 20)
    do("train", tmp_path / "w", *new, "--train.steps=24")
    assert "training from step 20 to 24" in capsys.readouterr().out, "the run has its own checkpoints by now"


def test_what_no_run_can_begin_with_is_refused_before_anything_is_written(trained, tmp_path, capsys):
    def says(*more: str) -> str:
        said = refused(capsys, "train", tmp_path / "w", *more)
        assert said.count("\n") == 1
        return said

    assert "is of another model: " in says(f"--train.init={trained}", "--net.width=32", "--train.steps=20")
    assert "no whole checkpoint of step 7 (saved: [4, 8, 12, 16]" in says(
        f"--train.init={trained}@7", "--train.steps=20"
    )
    assert f"{trained} is at step 16: --train.steps must be no less, not 15" in says(
        f"--train.init={trained}", "--train.steps=15"
    )
    assert "no run with checkpoints is there; give RUN or RUN@STEP" in says(f"--train.init={tmp_path / 'none'}")
    assert not (tmp_path / "w").exists()


def test_a_run_that_exists_is_no_place_to_begin_a_new_one(trained, tmp_path, capsys):
    rescued, init = tmp_path / "w", f"--train.init={trained}@8"
    said = refused(capsys, "train", trained, "--train.steps=20", init)
    assert "train.init: the run has null" in said
    assert said.splitlines()[-1] == "--train.init begins a new run, in a new --workdir; this one goes on without it"
    do("train", rescued, "--train.steps=12", init)
    on = f"this one goes on with --train.init {trained}@8, as it began"
    for more in ([], [f"--train.init={trained}@12"]):
        assert refused(capsys, "train", rescued, "--train.steps=16", *more).splitlines()[-1].endswith(on)
    assert "train.init" not in refused(capsys, "train", rescued, "--train.steps=16", init, "--seed=7")
    do("train", rescued, "--train.steps=16", init)
    assert "training from step 12 to 16" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_a_run_is_sampled_and_evaluated_while_it_trains_but_by_one_at_a_time(trained, verb, capsys):
    with reserved(epath.Path(trained)):
        do(verb, trained, "--sampling.seed=1")
        assert "in use by another run" in refused(capsys, "train", trained, "--train.steps=20", "--train.keep=9")
    with reserved(epath.Path(trained), training=False):
        assert "another command that samples or evaluates it" in refused(capsys, verb, trained)


def test_a_checkpoint_deleted_while_it_is_read_gives_way_to_a_newer_one(trained, tmp_path, monkeypatch, caplog):
    shutil.copytree(trained, tmp_path / "w")
    folder, read = tmp_path / "w" / "checkpoints", Checkpointer._read
    (folder / "16").rename(tmp_path / "16")

    def meanwhile(self, step, wanted):
        if step == 12:
            (tmp_path / "16").rename(folder / "16")
            shutil.rmtree(folder / "12")
        return read(self, step, wanted)

    monkeypatch.setattr(Checkpointer, "_read", meanwhile)
    do("sample", tmp_path / "w")
    with np.load(tmp_path / "w" / "samples.npz") as file:
        assert json.loads(str(file["gddim"]))["step"] == 16
    assert "damaged" not in caplog.text


def test_more_steps_tell_where_they_move_the_cooldown(tmp_path, capsys):
    cool = ("--train.cooldown=6",)
    do("train", tmp_path / "w", "--train.steps=8", *cool)
    assert "cooldown" not in capsys.readouterr().out
    do("train", tmp_path / "w", "--train.steps=16", *cool)
    line = (
        "train.steps was 8 and is 16: the cooldown begins at step 10, not 2, and the learning rate, which fell already,"
    )
    assert line in capsys.readouterr().out
    do("train", tmp_path / "w", "--train.steps=16", *cool)
    assert "cooldown" not in capsys.readouterr().out


def test_a_cooldown_as_long_as_the_run_ends_elsewhere(tmp_path, capsys):
    cool = ("--train.cooldown=60",)
    do("train", tmp_path / "w", "--train.steps=8", *cool)
    do("train", tmp_path / "w", "--train.steps=16", *cool)
    assert "train.steps was 8 and is 16: the cooldown ends at step 16, not 8, and the" in capsys.readouterr().out
