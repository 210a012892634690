"""What the tests of the command line share."""

import re

import pytest

from gddim.experiment import Experiment
from gddim.experiment.cli import main


def status_of(experiment: Experiment, *argv: str) -> int:
    """The status with which a command line ends."""
    with pytest.raises(SystemExit) as caught:
        main(experiment, argv)
    return int(caught.value.code or 0)


def options_told(text: str) -> set[str]:
    """Those that a help tells."""
    return set(re.findall(r"(?<=[│ ] |, )--[a-z][\w.-]+(?= |,)", text))
