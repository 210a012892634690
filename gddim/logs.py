"""What a run tells while it trains: a progress bar or plain lines, and TensorBoard."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from gddim.errors import from_extra

FLUSH = 60.0  # seconds from one flush of the events to the next: a bucket takes the whole file each time


class Log:
    """Scalars, pictures and text of one run; process 0 makes one, the others a silent one.

    `folder` holds the TensorBoard events. A run resumed at `step` discards what an earlier life wrote beyond it.
    When they cannot be written, for a full disk or a lost bucket, a line says so and the training goes on.
    `full_rate` is the images/s at which one of `chips` would do nothing but the model's arithmetic, where it is known.
    """

    def __init__(
        self,
        folder: str,
        *,
        step: int,
        steps: int,
        batch: int,
        chips: int = 1,
        full_rate: float | None = None,
        quiet: bool = False,
    ):
        self._steps, self._batch, self._quiet = steps, batch, quiet
        self._chips, self._full_rate = chips, full_rate
        self._since: tuple[int, float] | None = None  # the step and time that images/s counts from
        self._events = self._bar = None
        if quiet:
            return
        self._events = _Events(folder, step, self.say)
        if sys.stderr.isatty():
            with from_extra("train"):
                from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def tick(self, step: int) -> None:
        """Note that `step` was dispatched. The first tick starts the clock, so that compilation is not in images/s."""
        self._since = self._since or (step, time.perf_counter())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what is done inside, pictures for example, out of images/s."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since = (self._since[0], self._since[1] + time.perf_counter() - start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Report the means of an interval that ends at `step`, with its throughput and the time left."""
        before, then = self._since or (step, time.perf_counter())
        self._since = (step, time.perf_counter())
        rate = (step - before) / max(self._since[1] - then, 1e-9)
        per_chip = rate * self._batch / self._chips
        values = values | {"images_per_second": rate * self._batch, "images_per_second_per_chip": per_chip}
        if self._full_rate:
            values["flops_utilisation"] = per_chip / self._full_rate
        if self._events is None:
            return
        for name, value in values.items():
            self._events.add(step, "scalar", f"train/{name}", value)
        words = f"loss {values['loss']:.4f}, {values['images_per_second']:.4g} images/s"
        words += f" ({per_chip:.4g} per chip)" if self._chips > 1 else ""
        words += f", {values['flops_utilisation']:.1%} of peak FLOP/s" if self._full_rate else ""
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)
        else:
            left = (self._steps - step) / rate if rate else 0.0
            more = f"gradient norm {values['grad_norm']:.3g}, learning rate {values['learning_rate']:.3g}"
            self.say(f"step {step}/{self._steps}: {words}, {more}, {left // 60:.0f}:{left % 60:02.0f} left")

    def metrics(self, step: int, of: str, values: dict[str, float]) -> None:
        """Report an evaluation, of so and so many samples."""
        if self._events is None:
            return
        for name, value in values.items():
            self._events.add(step, "scalar", f"evaluation of {of}/{name}", value)
        self.say(f"step {step}/{self._steps}, {of}: {', '.join(f'{k} {v:.4g}' for k, v in values.items())}")

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture `(H, W, 3)` in uint8."""
        if self._events is not None:
            self._events.add(step, "image", name, pixels.transpose(2, 0, 1))

    def text(self, name: str, words: str) -> None:
        """A page of text, as it is."""
        if self._events is not None:
            self._events.add(0, "text", name, "    " + words.replace("\n", "\n    "))

    def say(self, words: str) -> None:
        """A line on the terminal that does not tear the progress bar."""
        if self._bar is not None:
            self._bar.write(words)
        elif not self._quiet:
            print(f"{words}\n", end="", flush=True)  # in one write: the thread of the events says something too

    def close(self) -> None:
        """Flush and end."""
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()


class _Events:
    """TensorBoard's events in `folder` from `step` on, written by a thread; `say` tells what ended the writing.

    tensorboardX's `SummaryWriter` has such a thread too, but once that has died of an error, the queue to it blocks.
    """

    def __init__(self, folder: str, step: int, say: Callable[[str], None]):
        with from_extra("train"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboardX.record_writer import directory_check

        directory_check(folder)  # makes it, unless it is in a bucket
        self._folder, self._say, self._event = folder, say, Event
        self._file = EventsWriter(os.path.join(folder, "events"))
        self._flushed, self._lost = -math.inf, False
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        # What a life that ended beyond `step` told after it is void, also where it saved nothing; what it told at it holds.
        self._put(step + 1, session_log={"status": "START"})

    def add(self, step: int, kind: str, name: str, value: Any) -> None:
        """Append a `"scalar"`, a `"text"` or an `"image"`, of shape `(C, H, W)`."""
        from tensorboardX import summary

        self._put(step, summary=getattr(summary, kind)(name, value))

    def close(self) -> None:
        """Return when all is written."""
        self._thread.submit(self._try, self._file.close)
        self._thread.shutdown()

    def _put(self, step: int, **what: Any) -> None:
        self._thread.submit(self._try, self._write, self._event(wall_time=time.time(), step=step, **what))

    def _write(self, event: Any) -> None:
        self._file.write_event(event)
        if time.monotonic() > self._flushed + FLUSH:
            self._file.flush()
            self._flushed = time.monotonic()

    def _try(self, do: Callable[..., Any], *arguments: Any) -> None:
        """Nothing is written after an error: a record cut short ends what TensorBoard reads of the file."""
        try:
            if not self._lost:
                do(*arguments)
        except Exception as error:  # of the file system, or whatever a bucket's client raises
            self._lost = True
            self._say(f"{self._folder}: no more events for TensorBoard: {type(error).__name__}: {error}")


def read_scalars(folder: epath.Path, tag: str) -> dict[int, float]:
    """A curve by step, as the events of all lives of a run tell it: from a START on, what was told before is void."""
    found: dict[int, float] = {}
    if not (files := sorted(folder.glob("events.out.tfevents.*"))):
        return found
    with from_extra("train"):
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    for file in files:
        data, at = file.read_bytes(), 0
        while at + 16 <= len(data):  # the length of a record, its checksum, the record, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            record, at = data[at + 12 : at + 12 + length], at + 16 + length
            if at > len(data):  # a run that was killed leaves its last record cut short
                break
            event = Event.FromString(record)
            if event.session_log.status == event.session_log.START:
                found = {step: kept for step, kept in found.items() if step < event.step}
            found |= [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return found
