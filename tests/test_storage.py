"""Files are written whole or not at all, and what is held is held by one."""

import errno
import json
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from etils import epath

from gddim.evaluation.cell import Evaluator
from gddim.evaluation.sweep import _Keeper, read_rows, sweep
from gddim.experiment.workdir import reserved
from gddim.storage import all_or_none, free_bytes, locked, write_whole
from tests.test_sweep import cells, evaluator


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    file = epath.Path(tmp_path / "results.jsonl")
    write_whole(file, b"old")
    monkeypatch.setattr("gddim.storage._beside", lambda path: path.with_name(".new"))
    (tmp_path / ".new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"results\.jsonl: No space left on device; what was there before remains$"):
        write_whole(file, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    assert file.read_bytes() == b"old"


def test_what_is_locked_is_held_by_one_and_let_go(tmp_path):
    def refuse() -> NoReturn:
        raise RuntimeError("held")

    path = tmp_path / "lock"
    for _ in range(2):  # a file that is made, and one that is there
        with locked(path), pytest.raises(RuntimeError, match="held"):
            locked(path, refuse).__enter__()
        with locked(path, refuse):
            pass
    with locked(epath.Path("gs://bucket/run"), refuse) as held, locked(epath.Path("gs://bucket/run"), refuse):
        assert not held


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def none(*_) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    with reserved(epath.Path(tmp_path)):
        assert capsys.readouterr().err == ""
    monkeypatch.setattr("fcntl.flock", none)
    with reserved(epath.Path(tmp_path)):
        assert "nothing keeps a second training out of it" in capsys.readouterr().err


def test_two_writers_of_a_file_do_not_meet(tmp_path, monkeypatch):
    """The second begins and ends between the first one's writing and its replacing."""
    file, replace = epath.Path(tmp_path / "statistics.npz"), type(epath.Path(tmp_path)).replace

    def after_another(self, target):
        monkeypatch.undo()
        write_whole(file, b"second")
        assert file.read_bytes() == b"second"
        return replace(self, target)

    monkeypatch.setattr(type(file), "replace", after_another)
    write_whole(file, b"first")
    assert file.read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]


def test_what_fails_half_way_leaves_nothing_new_and_keeps_what_was_there(tmp_path):
    old, new, folder = (epath.Path(tmp_path / name) for name in ("old", "new", "folder"))
    old.write_text("before")

    def stopped() -> NoReturn:
        with all_or_none(old, new, folder):
            old.write_text("after")
            new.write_text("half")
            folder.mkdir()
            (folder / "1").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_bucket_has_room(tmp_path):
    assert 0 < free_bytes(tmp_path) < free_bytes(epath.Path("gs://bucket/run")) == float("inf")


def test_batches_that_an_interrupted_cell_kept_make_way(tmp_path: Path):
    points = np.zeros((5, 2), np.float32)
    for first in (0, 5, 10):
        _Keeper(epath.Path(tmp_path))(first, points)
    again = _Keeper(epath.Path(tmp_path))
    for first in (5, 8):
        again(first, points[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.npz", "000005.npz", "000008.npz"]


def test_rows_that_others_add_meanwhile_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a bucket, where nothing locks a workdir."""
    results, run = tmp_path / "results.jsonl", Evaluator.run
    (theirs,) = sweep(evaluator(), cells()[:1], tmp_path / "other")

    def while_they_add(self, cell, *rest):
        results.write_text(json.dumps(theirs) + "\n")
        return run(self, cell, *rest)

    monkeypatch.setattr(Evaluator, "run", while_they_add)
    (ours,) = sweep(evaluator(), cells()[1:2], tmp_path)
    assert read_rows(results) == [theirs, ours]
