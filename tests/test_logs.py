"""The log: TensorBoard reads what was told, and a log that cannot be written does not stop a run."""

import struct
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from gddim.logs import Log, read_scalars

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


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of what TensorBoard shows of each scalar: a START voids what was told before from its step on."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        found: dict[str, list[tuple[int, float]]] = {}
        for event in told(folder):
            if event.session_log.status == 1:
                found = {tag: [pair for pair in pairs if pair[0] < event.step] for tag, pairs in found.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
        return found
    reader = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def live(folder: Path, step: int, until: int, loss: float, every: int = 10) -> None:
    """One life of a run, which reports and evaluates `every` so many steps until it dies."""
    before = set(folder.iterdir())
    log = Log(str(folder), step=step, steps=100, batch=4)
    for at in range(step + every, until + 1, every):
        log.scalars(at, VALUES | {"loss": loss})
        log.metrics(at, "20 samples", {"FID": loss})
    log.close()
    (file,) = {*folder.iterdir()} - before
    file.rename(folder / f"events.out.tfevents.life{len(before)}")  # two of a second have one name


def test_a_later_life_takes_the_place_of_what_earlier_ones_told_beyond_its_step_and_of_no_more(tmp_path):
    live(tmp_path, 0, 30, 0.5)  # dies before its first checkpoint
    live(tmp_path, 0, 60, 1.0)  # saves at 40
    live(tmp_path, 40, 50, 2.0)  # dies before its next
    live(tmp_path, 40, 80, 4.0)
    expected = [(10, 1.0), (20, 1.0), (30, 1.0), (40, 1.0), (50, 4.0), (60, 4.0), (70, 4.0), (80, 4.0)]
    found = shown(tmp_path)
    assert found["train/loss"] == expected
    assert found["evaluation_of_20_samples/FID"] == expected
    assert list(read_scalars(epath.Path(tmp_path), "train/loss").items()) == expected


def test_the_report_and_tensorboard_show_the_same_curve_of_lives_that_report_at_other_steps(tmp_path):
    live(tmp_path, 0, 50, 1.0)  # saves at 20
    live(tmp_path, 20, 60, 2.0, every=40)  # what was told of 30 to 50 is void though nothing takes its place
    expected = [(10, 1.0), (20, 1.0), (60, 2.0)]
    assert shown(tmp_path)["train/loss"] == expected
    assert list(read_scalars(epath.Path(tmp_path), "train/loss").items()) == expected
    live(tmp_path, 10, 10, 3.0)  # saves nothing and tells nothing
    assert shown(tmp_path)["train/loss"] == expected[:1]
    assert list(read_scalars(epath.Path(tmp_path), "train/loss").items()) == expected[:1]


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
