"""Shards: written once, continued after an interruption, and never over anything else."""

import json
import os
from dataclasses import dataclass, field

import numpy as np
import pytest
from data_helpers import pixels, records

from gddim.data import ArrayFile, ArraySource, Shards, batches, prepare, shards
from gddim.errors import UserError
from gddim.storage import locked

RECORDS = pixels(0, 1000, 4, 4, 3)
POINTS = np.random.default_rng(1).normal(size=(1000, 3)).astype(np.float32)
SHARD_BYTES = 300 * 48


@dataclass
class Interrupted:
    """Records whose reading stops at a certain one."""

    array: np.ndarray
    stop: int
    flip: bool = True

    def __post_init__(self):
        self.shape, self.dtype = self.array.shape[1:], self.array.dtype

    def __len__(self):
        return len(self.array)

    def __getitem__(self, indices):
        if self.stop in indices and indices[-1] - indices[0] < 64:  # while written, not in the sample before
            raise KeyboardInterrupt
        return self.array[indices]


@dataclass
class Data:
    array: np.ndarray = field(default_factory=lambda: RECORDS, repr=False)
    stop: int = field(default=-1, repr=False)

    @property
    def shape(self):
        return self.array.shape[1:]

    def train(self):
        return Interrupted(self.array[:-100], self.stop)

    def test(self):
        return ArraySource(self.array[-100:])


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}


@pytest.mark.parametrize("array", [RECORDS, POINTS], ids=["images", "points"])
def test_what_is_written_is_read(tmp_path, array):
    dest = tmp_path / "new" / "shards"
    prepare(Data(array), dest, SHARD_BYTES)
    data = Shards(str(dest))
    assert (data.shape, data.train().dtype, data.train().flip) == (array.shape[1:], array.dtype, True)
    np.testing.assert_array_equal(records(data.train()), array[:-100])
    np.testing.assert_array_equal(records(data.test()), array[-100:])
    scattered = np.random.default_rng(2).integers(0, 900, 500)
    np.testing.assert_array_equal(data.train()[scattered], array[scattered])
    assert data.train()[np.arange(0)].shape == (0, *array.shape[1:])


def test_batches_of_shards_are_those_of_the_source(tmp_path):
    prepare(Data(), tmp_path / "shards", SHARD_BYTES)
    from_shards = batches(Shards(str(tmp_path / "shards")).train(), 64, seed=3)
    from_memory = batches(ArraySource(RECORDS[:-100]), 64, seed=3)
    for _ in range(40):
        np.testing.assert_array_equal(next(from_shards), next(from_memory))


def test_records_of_two_types_are_refused_with_both(tmp_path, monkeypatch):
    monkeypatch.setattr(Data, "test", lambda data: ArraySource(data.array[-100:] / np.float32(255) - 1))
    with pytest.raises(UserError, match=r"are uint8 \(4, 4, 3\), but those held out are float32 \(4, 4, 3\)"):
        prepare(Data(), tmp_path)


@pytest.mark.parametrize("stop", [0, 299, 300, 650, 899])
def test_an_interrupted_prepare_goes_on(tmp_path, stop, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK", 64)
    whole, dest = tmp_path / "whole", tmp_path / "dest"
    prepare(Data(), whole, SHARD_BYTES)
    with pytest.raises(KeyboardInterrupt):
        prepare(Data(stop=stop), dest, SHARD_BYTES)
    done = stamps(dest)
    assert len(done) == stop // 300
    with pytest.raises(UserError, match=r"lacks train-0000\d.array_record .*prepare` again"):
        Shards(str(dest)).train()
    prepare(Data(), dest, SHARD_BYTES)
    assert done.items() <= stamps(dest).items()
    assert json.loads((dest / "manifest.json").read_text()) == json.loads((whole / "manifest.json").read_text())
    assert sorted(p.name for p in dest.iterdir()) == sorted(p.name for p in whole.iterdir())
    np.testing.assert_array_equal(records(Shards(str(dest)).train()), RECORDS[:-100])


def test_a_damaged_shard_is_named_and_prepared_again(tmp_path):
    prepare(Data(), tmp_path, SHARD_BYTES)
    path = tmp_path / "train-00001.array_record"
    whole = path.read_bytes()
    before = stamps(tmp_path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 16
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"train-00001.array_record cannot be read .* prepare it again"):
        records(Shards(str(tmp_path)).train())
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"lacks train-00001.array_record or a part of it"):
        Shards(str(tmp_path)).train()
    path.write_bytes(damaged)
    prepare(Data(), tmp_path, SHARD_BYTES)
    np.testing.assert_array_equal(records(Shards(str(tmp_path)).train()), RECORDS[:-100])
    assert [name for name, stamp in stamps(tmp_path).items() if stamp != before[name]] == [path.name]


def test_a_prepare_that_the_disk_had_no_room_to_begin_goes_on(tmp_path, monkeypatch):
    def full(handle):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", full)
        with pytest.raises(UserError, match="run the same command to go on"):
            prepare(Data(), tmp_path, SHARD_BYTES)
    prepare(Data(), tmp_path, SHARD_BYTES)
    np.testing.assert_array_equal(records(Shards(str(tmp_path)).train()), RECORDS[:-100])


@pytest.mark.parametrize("name", ["holiday.jpg", "manifest.json"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds other files|is not a manifest"):
        prepare(Data(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"
    with pytest.raises(UserError, match="is a file"):
        prepare(Data(), tmp_path / name)


def test_another_data_set_is_not_written_over(tmp_path):
    prepare(Data(), tmp_path, SHARD_BYTES)
    before = stamps(tmp_path)
    with pytest.raises(UserError, match=r"was begun with counts .*900.* not .*400"):
        prepare(Data(RECORDS[:500]), tmp_path, SHARD_BYTES)
    with pytest.raises(UserError, match=r"was begun with content"):
        prepare(Data(RECORDS[::-1]), tmp_path, SHARD_BYTES)
    with pytest.raises(UserError, match="was begun with shape"):
        prepare(Data(POINTS), tmp_path, SHARD_BYTES)
    assert stamps(tmp_path) == before


def test_more_shards_than_a_thread_keeps_open(tmp_path, monkeypatch):
    prepare(Data(), tmp_path, shard_bytes=len(RECORDS[0].tobytes()) * 30)
    monkeypatch.setattr(shards, "_OPEN", 4)
    source = Shards(str(tmp_path)).train()
    before = len(os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(records(source), RECORDS[:-100])
    assert len(os.listdir("/proc/self/fd")) - before <= 4


def test_prepare_goes_on_from_a_source_that_was_moved(tmp_path):
    np.save(tmp_path / "a.npy", RECORDS)
    prepare(ArrayFile(str(tmp_path / "a.npy")), tmp_path / "dest", SHARD_BYTES)
    (tmp_path / "dest" / "train-00001.array_record").unlink()
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    prepare(ArrayFile(str(tmp_path / "b.npy")), tmp_path / "dest", SHARD_BYTES)
    np.testing.assert_array_equal(records(Shards(str(tmp_path / "dest")).test()), RECORDS[9::10])


def test_two_at_once_are_refused(tmp_path):
    tmp_path.joinpath(".lock").touch()
    with locked(tmp_path / ".lock"), pytest.raises(UserError, match="another process writes"):
        prepare(Data(), tmp_path)


def test_no_shards_are_named(tmp_path):
    with pytest.raises(UserError, match=r"is no folder of shards: python -m gddim.data prepare"):
        Shards(str(tmp_path / "nowhere")).train()
