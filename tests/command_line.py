"""What the tests of the command line share."""

import re
from pathlib import Path

import pytest

from gddim.experiment import Experiment
from gddim.experiment.cli import main


def status_of(experiment: Experiment, *argv: str) -> int:
    """The status with which a command line ends."""
    with pytest.raises(SystemExit) as caught:
        main(experiment, argv)
    return int(caught.value.code or 0)


def refusal(experiment: Experiment, run: Path, capsys: pytest.CaptureFixture[str], verb: str, *words: str) -> str:
    """The line in which a verb refuses a run, which stays as it was, with status 2."""
    before = sorted(run.iterdir())
    assert status_of(experiment, verb, f"--workdir={run}", *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert sorted(run.iterdir()) == before
    return said


def options_told(text: str) -> set[str]:
    """Those that a help tells."""
    return set(re.findall(r"(?<=[│ ] |, )--[a-z][\w.-]+(?= |,)", text))
