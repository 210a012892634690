"""The log: TensorBoard reads what was told, and a log that cannot be written does not stop a run."""

import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from gddim.logs import Log

FULL = Path("/dev/full")
VALUES = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 2e-4}


def told(folder: Path) -> list[Event]:
    """The events in the records of the files there: each a length, its checksum, the bytes, their checksum."""
    events = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_everything_that_was_told_can_be_read_back(tmp_path):
    log = Log(str(tmp_path / "events"), step=0, steps=100, batch=4)
    log.text("experiment", "a\nb")
    for step in range(10, 101, 10):
        log.tick(step)
        log.scalars(step, VALUES | {"loss": 1 / step})
    log.image(100, "samples", np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    log.metrics(100, "20 samples", {"FID": 2.5})
    log.close()
    found = {(e.step, v.tag): v for e in told(tmp_path / "events") for v in e.summary.value}
    losses = {step: value.simple_value for (step, tag), value in found.items() if tag == "train/loss"}
    assert losses == {step: np.float32(1 / step) for step in range(10, 101, 10)}
    assert found[100, "evaluation_of_20_samples/FID"].simple_value == 2.5
    assert (found[100, "samples"].image.height, found[100, "samples"].image.width) == (2, 3)
    assert found[0, "experiment/text_summary"].tensor.string_val == [b"    a\n    b"]


def test_a_resumed_run_discards_what_is_beyond_its_step(tmp_path):
    Log(str(tmp_path), step=40, steps=100, batch=4).close()
    assert [event.step for event in told(tmp_path) if event.session_log.status == 1] == [40]


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_full_takes_the_events_but_not_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(record_writer, "open_file", lambda path: FULL.open("wb"))
    log = Log(str(tmp_path), step=0, steps=100, batch=4)
    for step in range(1, 101):
        log.tick(step)
        log.scalars(step, VALUES)
    log.close()
    said, errors = capfd.readouterr()
    assert said.count(f"{tmp_path}: no more events for TensorBoard: OSError: [Errno 28] No space left on device\n") == 1
    assert "step 100/100" in said
    assert not errors


def test_a_silent_log_writes_nothing(tmp_path, capfd):
    log = Log(str(tmp_path / "events"), step=0, steps=100, batch=4, quiet=True)
    log.tick(10)
    log.scalars(10, VALUES)
    log.metrics(10, "20 samples", {"FID": 2.5})
    log.say("nothing")
    log.close()
    assert not any(capfd.readouterr())
    assert not (tmp_path / "events").exists()
