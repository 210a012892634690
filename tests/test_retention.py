"""Retention: what a run keeps for good stays, whatever later runs keep."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from gddim.checkpoint import Checkpointer, _seal


def save_all(folder: Path, steps, **keep) -> list[int]:
    """What a life of a run that saves these steps leaves."""
    saved = Checkpointer(folder, **keep)
    for step in steps:
        saved.save(step, {"ema": jnp.float32(step)}, {})
    saved.close()
    return saved.steps()


@pytest.mark.parametrize(
    ("steps", "every", "left"),
    [
        (range(1, 10), 4, [4, 8, 9]),
        ([104, 200, 304, 400, 440], 100, [104, 200, 304, 400, 440]),  # eight steps a dispatch
        (range(30, 331, 30), 100, [120, 210, 300, 330]),
        ([50, 350, 380, 390], 100, [350, 390]),  # one save for three multiples
    ],
)
def test_the_newest_and_the_first_at_or_after_each_multiple_are_kept(tmp_path, steps, every, left):
    assert save_all(tmp_path / "run", steps, keep_last=1, keep_every=every) == left


def test_what_was_kept_for_good_survives_runs_that_keep_less(tmp_path):
    run = tmp_path / "run"
    assert save_all(run, range(10, 100, 10), keep_last=2, keep_every=40) == [40, 80, 90]
    assert save_all(run, [100, 110, 120], keep_last=1) == [40, 80, 120]
    assert save_all(run, [130, 140, 150], keep_last=1, keep_every=70) == [40, 80, 140, 150]  # 80 is that of 70 as well
    shutil.rmtree(run / "150" / "manifest")
    assert save_all(run, [160, 170], keep_last=1) == [40, 80, 140, 170]


def test_what_is_there_when_a_run_begins_to_keep_for_good_counts(tmp_path):
    run = tmp_path / "run"
    assert save_all(run, [80, 90, 100], keep_last=2) == [90, 100]
    assert save_all(run, [110, 120], keep_last=1, keep_every=100) == [100, 120]
    assert save_all(run, [130], keep_last=1) == [100, 130]


def test_a_checkpoint_from_before_there_were_lists_stays(tmp_path):
    run = tmp_path / "run"
    save_all(run, [10, 20])
    for file in run.glob("*/manifest/metadata"):
        manifest = json.loads(file.read_text())
        del manifest["kept"]
        file.write_text(json.dumps(_seal(manifest)))
    assert save_all(run, [30, 40], keep_last=1) == [10, 20, 40]
