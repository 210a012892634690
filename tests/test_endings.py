"""How a command ends that Ctrl-C stops, or that finds memory full: in one line, with a status of its own."""

import sys

import jax
import pytest

import gddim.convert.command
import gddim.data.__main__
import gddim.evaluation.__main__
from experiments.solvers import __main__ as solvers
from experiments.solvers import images

DATA, EVALUATION = gddim.data.__main__, gddim.evaluation.__main__
COMMANDS = {
    "prepare digits DEST": (DATA, "prepare", "the same command goes on where it stopped"),
    "std digits": (DATA, "_dataset", "nothing is written"),
    "stats digits OUT.npz": (EVALUATION, "check_backend", "nothing is written"),
    "report RESULTS OUT": (EVALUATION, "read_rows", "each file is whole, new or as it was"),
    "SOURCE RUN": (gddim.convert.command, "check_backend", "no run is written"),
    "--out OUT": (solvers, "run", "the cells that were measured are in OUT/cells.jsonl"),
    "--nfe 5": (images, "run", "each line that is printed is whole"),
}


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted: "),
        (MemoryError(), 1, "error: out of memory: "),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), 1, "error: out of memory: "),
        (OSError("No space left on device"), 2, "error: No space left on device"),
    ],
    ids=["Ctrl-C", "host", "device", "disk"],
)
def test_a_command_that_does_not_get_to_its_end_says_so_in_a_line(
    words, error, status, says, tmp_path, monkeypatch, capsys
):
    def stop(*_):
        raise error

    module, part, left = COMMANDS[words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, part, stop)
    monkeypatch.setattr(sys, "argv", ["program", *words.split()])
    try:
        ended = module.main()
    except SystemExit as end:
        ended = end.code
    assert ended == status
    said = capsys.readouterr().err
    assert said.startswith(says + left * (status == 130))
    assert said.count("\n") == 1
