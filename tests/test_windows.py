"""A run in windows: each trains for so long, and what the next begins with makes all of them one run."""

import json
import shlex
from pathlib import Path

import pytest

from experiments import points
from gddim.experiment.cli import main

WORDS = [
    *("--train.batch=16", "--train.warmup=4", "--train.save-every=1000", "--train.report-every=4", "--train.steps=3"),
    *("--net.width=16", "--net.depth=1", "--data.train-points=100", "--data.test-points=50"),
]  # fmt: skip


def train(workdir: Path, *more: str) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main(points.EXPERIMENT, ["train", f"--workdir={workdir}", *WORDS, *more])
    return int(ended.value.code or 0)


def sums(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_text())["items"]


@pytest.mark.parametrize("fused", [1, 2])
def test_windows_by_the_clock_are_one_run_bit_for_bit(tmp_path, capsys, fused):
    more = (f"--train.fused={fused}", "--train.minutes=1e-9")
    ended = []
    while (status := train(tmp_path / "w", *more)) == 75:
        said = capsys.readouterr().err.splitlines()[-1]
        assert "of 3; to continue: python " in said
        assert said.endswith(shlex.join(["train", f"--workdir={tmp_path / 'w'}", *WORDS, *more]))
        ended.append(int(said.split("saved at step ")[1].split()[0]))
    assert status == 0
    assert ended == list(range(fused, 3, fused)), "each makes the one dispatch for which there is always time"
    assert train(tmp_path / "whole", more[0]) == 0
    assert sums(tmp_path / "w", 3) == sums(tmp_path / "whole", 3)


@pytest.mark.parametrize("minutes", ["-1", "inf", "nan"])
def test_a_time_that_is_none_is_refused(tmp_path, capsys, minutes):
    assert train(tmp_path / "w", f"--train.minutes={minutes}") == 2
    assert f"minutes must be at least 0, not {minutes}" in capsys.readouterr().err
