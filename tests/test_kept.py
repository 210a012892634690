"""What is kept when something goes wrong: what was trained, what others wrote, and room for the same command again."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import refusal, status_of
from etils import epath
from runs import COLOUR, make_run

import gddim
from experiments import points
from gddim import GDDIM, export
from gddim.checkpoint import Checkpointer
from gddim.evaluation import statistics, sweep
from gddim.evaluation.features import PixelFeatures
from gddim.experiment.outputs import origin_of_network
from gddim.parallel import EXIT_PREEMPTED
from gddim.samplers import LearnedTable
from gddim.samplers.learned import Stored
from tests.test_sweep import cells, evaluator

WORDS = (
    *("--train.steps=8", "--train.batch=16", "--train.warmup=4", "--train.save-every=4", "--train.snapshot-every=4"),
    *("--train.ema-profiles", "0.05", "0.1", "--net.width=16", "--net.depth=1", "--data.train-points=100"),
    *("--sampling.samples=8", "--sampling.batch=8", "--sampling.nfe=2", "--train.show-every=4"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "w")


def test_a_run_outlives_its_pictures_mends_its_snapshots_and_hears_a_last_signal(tmp_path, monkeypatch, capsys):
    workdir, words = tmp_path / "w", ("train", f"--workdir={tmp_path / 'w'}", *WORDS)

    def full(*_):
        raise OSError("00000004.png: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gddim.experiment.verbs.train.write_figure", full)
        assert status_of(points.EXPERIMENT, *words) == 0
    assert "no samples of step 4: 00000004.png: No space left" in capsys.readouterr().out
    last = workdir / "snapshots" / "8" / "1-of-1.safetensors"
    before = last.read_bytes()
    last.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "close", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        assert status_of(points.EXPERIMENT, *words) == EXIT_PREEMPTED
    assert "trained, 8 steps; to continue: " in capsys.readouterr().err
    assert last.read_bytes() == before
    assert status_of(points.EXPERIMENT, *words) == 0


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("sample", ("--sampling.power=inf",), "must fall from call to call"),
        ("evaluate", ("--sampling.seed=2147483647", "--eval.seeds=2"), "must be below 2³¹"),
        ("sample", (f"--seed={2**64}",), "seed must be in"),
    ],
)
def test_numbers_beyond_every_limit_are_refused_before_the_work(run, capsys, verb, words, said):
    assert said in refusal(COLOUR, run, capsys, verb, "--eval.features=pixels", *words)


@pytest.mark.parametrize("name", ["results.md", "results.pdf"])
def test_a_table_of_somebody_elses_is_not_overwritten(run, tmp_path, capsys, name):
    workdir = tmp_path / "w"
    shutil.copytree(run, workdir)
    (workdir / name).write_text("my own")
    assert f"{name} is of no results.jsonl" in refusal(COLOUR, workdir, capsys, "evaluate", "--eval.features=pixels")


def test_what_two_tables_of_one_name_made_is_told_apart(run):
    params = gddim.load(run).model.net
    params = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    table, about = GDDIM(1).coefficients(COLOUR.sde, gddim.power_grid(1.0, 1e-3, 2)), {"process": "vp", "network": "0"}
    tables = [LearnedTable("t.npz", Stored(digest=each, table=table, about=about)) for each in ("a", "b")]
    drawn = [dataclasses.replace(COLOUR.sampling, sampler=each) for each in tables]
    origins = [origin_of_network(COLOUR, 2, params, each) for each in drawn]
    assert origins[0] != origins[1]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_room_for_the_same_command(run, tmp_path, monkeypatch, capsys, error):
    def fails(*_, **__):
        raise error

    (tmp_path / "state").mkdir()
    commands = {
        "gddim.export.command.portable": (str(tmp_path / "a.safetensors"), "--hub-layout", str(tmp_path / "hub"),
                                          "--stablehlo", str(tmp_path / "p")),
        "gddim.compact._file": (str(tmp_path / "state"), "--state"),
    }  # fmt: skip
    for where, words in commands.items():
        with monkeypatch.context() as patch:
            patch.setattr(where, fails)
            assert export.main([str(run), *words]) in (2, 130)
        assert capsys.readouterr().err.count("\n") == 1
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert export.main([str(run), *commands["gddim.compact._file"]]) == 0
    assert export.main([str(run), *commands["gddim.export.command.portable"][:-2]]) == 0


def test_all_processes_draw_the_cells_that_the_first_one_lacks(tmp_path, monkeypatch):
    """As when one of them sees an older file."""
    found = evaluator()
    rows = sweep.sweep(found, cells()[:1], tmp_path)
    assert len(rows) == 1
    drawn = []
    monkeypatch.setattr(type(found), "run", lambda self, cell, *_: drawn.append(cell) or rows[0])
    monkeypatch.setattr(sweep, "agree", lambda mine: np.array([False] * len(mine)))
    assert sweep.sweep(found, cells()[:1], tmp_path) == rows
    assert len(drawn) == 1
    monkeypatch.setattr(sweep, "agree", lambda mine: np.array([True] * len(mine)))
    assert sweep.sweep(found, cells()[:1], tmp_path / "nothing here") == []
    assert len(drawn) == 1


def test_statistics_that_one_process_does_not_see_are_taken_by_all(tmp_path, monkeypatch):
    source, space = COLOUR.data.train(), PixelFeatures()
    first = statistics.cached_statistics(source, space, "colours", tmp_path)
    asked = []
    monkeypatch.setattr(statistics, "agree", lambda mine, how: asked.append((mine, how([True, False]))) or False)
    again = statistics.cached_statistics(source, space, "colours", epath.Path(tmp_path))
    assert asked == [(True, False)]
    assert json.dumps(again.origin) == json.dumps(first.origin)
