"""The folder of one run: whose it is, what configuration it holds, and that only one process group writes to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

import gddim
from gddim.checkpoint import Checkpointer
from gddim.data import Source, classes_of, identity
from gddim.errors import UserError, harmless
from gddim.evaluation.provenance import flatten as flatten
from gddim.experiment.options import SPELLED, UNGROUPED
from gddim.experiment.spectrum import Spectrum
from gddim.parallel import agree, tell
from gddim.samplers import AbstractSampler
from gddim.samplers.words import sampler_name
from gddim.settings import MAY_CHANGE, MAY_CHANGE_AFTER, WHEN
from gddim.storage import free_bytes, is_local, locked, write_whole

if TYPE_CHECKING:
    from gddim.experiment.config import Experiment

CONFIG = "config.json"
RECORDS = "records"  # in it, what the run was trained on, by content
OBJECTS = "objects"  # in it, what makes it an experiment again: see `gddim.experiment.revival`


def describe(value: Any) -> Any:
    """A dataclass tree as JSON: each object its type and its fields, by the names of the command line; a sampler its word,
    what its field says it spells its spelling, a function its name, a spectrum its digest."""
    if isinstance(value, AbstractSampler):
        return sampler_name(value)
    if isinstance(value, Spectrum):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        described: dict[str, Any] = {"type": type(value).__name__}
        for field in dataclasses.fields(value):
            later = field.metadata.get("later") and getattr(value, field.name) == field.default
            if field.init and not later:
                inner = getattr(value, field.name)
                described[field.name] = part = field.metadata.get(SPELLED, describe)(inner)
                parts = dataclasses.fields(inner) if isinstance(part, dict) else ()
                lifted = [each.name for each in parts if each.metadata.get(UNGROUPED) and each.name in part]
                described |= {name: part.pop(name) for name in lifted}
        return described
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, str | int | float | None) else repr(value)


def may_change(value: Any, after: bool = False) -> set[str]:
    """The names of the fields that say of themselves that they may differ from a run's: as it goes on, or `after` it."""
    accepted = [MAY_CHANGE[WHEN], MAY_CHANGE_AFTER[WHEN]][: 1 + after]

    def marked(value: Any, group: str, above: str, inside: bool) -> Iterator[str]:
        for field in dataclasses.fields(value):
            name = f"{above if field.metadata.get(UNGROUPED) else group}{field.name}"
            free, inner = inside or field.metadata.get(WHEN) in accepted, getattr(value, field.name)
            if free:
                yield name
            if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
                yield from marked(inner, f"{name}.", group, free)

    return set(marked(value, "", "", False))


def differences(saved: dict, given: dict, free: Collection[str] = ()) -> list[str]:
    """One line for each field of two descriptions that differs and is none of the `free` ones (or inside one)."""
    # an empty list is as good as none, which an option that came later has
    saved, given = ({k: v for k, v in flatten(each) if v != []} for each in (saved, given))
    lines = []
    for name in sorted(saved.keys() | given.keys()):
        held = any(f"{name}.".startswith(f"{prefix}.") for prefix in free)
        if not held and saved.get(name) != given.get(name):
            lines.append(f"  {name}: the run has {_show(saved, name)}, this command {_show(given, name)}")
    return lines


def _show(values: dict, name: str) -> str:
    return json.dumps(values[name]) if name in values else "none"


def read_config(path: epath.Path, run: str | None = None) -> dict | None:
    """The configuration of the run in a workdir; None if there is nothing yet. Raises `UserError` for anything else.

    `run`: what errors call it, by default the option that names it.
    """
    ending = "" if run else ": give a new or an empty folder"
    run = run or f"--workdir {path}"
    try:
        if not path.exists():
            return None
        if not path.is_dir():
            raise UserError(f"{run} is a file, not a folder")
        if not (path / CONFIG).exists():
            if foreign := sorted(p.name for p in path.iterdir() if not (harmless(p.name) or _is_log(p))):
                raise UserError(
                    f"{run} holds something else ({', '.join(foreign[:3])}{', …' * (len(foreign) > 3)}) "
                    f"and no {CONFIG} of a run{ending}"
                )
            return None
        config = json.loads((path / CONFIG).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{run} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("type") != "Experiment":
        raise UserError(f"{run} holds something else: its {CONFIG} is not that of a run")
    return config


def _is_log(path: epath.Path) -> bool:
    """Whether a file is what a job prints: by its name, or because this process prints into it."""
    if path.suffix in (".log", ".out", ".err"):
        return True
    with contextlib.suppress(OSError):
        return any(os.path.samestat(os.stat(path), os.fstat(stream)) for stream in (1, 2))
    return False


def check_release(run: str, config: dict) -> None:
    """Raise `UserError` for a run whose network predicts the data from all fields of its process, as none does any more."""
    of_data = config.get("model", {}).get("predicts") == "data"
    if of_data and "sigma_mean" not in config.get("train", {}):
        raise UserError(
            f"{run} holds a Denoiser that sees all fields of its process, which gddim 0.1.0 reads and this release "
            f"({gddim.__version__}) does not: sample it with that one, or train it anew"
        )


def check_config(path: epath.Path, given: dict, free: Collection[str]) -> bool:
    """Whether a workdir holds a run of this configuration. Raises `UserError` if it holds another, or
    one of an earlier release.

    A run that has saved nothing yet is none: its configuration may be corrected. Its data are told by `check_records`.
    """
    saved = read_config(path)
    if saved is None or not saves(path):
        return False
    check_same(f"--workdir {path}", saved, given, free)
    return True


def check_same(run: str, saved: dict, given: dict, free: Collection[str]) -> None:
    """Raise `UserError` for a run of another configuration than the given one, or of an earlier release."""
    check_release(run, saved)
    fields = {*saved.get("data", {}), *given.get("data", {})} - {"labels"} if RECORDS in saved else ()
    if lines := differences(saved, given, (*free, RECORDS, OBJECTS, *(f"data.{name}" for name in fields))):
        began = saved.get("train", {}).get("init")
        if any(line.startswith("  train.init:") for line in lines):
            on = f"with --train.init {began}, as it began" if began else "without it"
            lines.append(f"--train.init begins a new run, in a new --workdir; this one goes on {on}")
        raise UserError(
            f"{run} holds a run of another configuration; repeat its options or give another folder:\n"
            + "\n".join(lines)
        )


def check_records(path: epath.Path, given: dict, source: Source, classes: int = 0) -> dict[str, Any]:
    """What the records of a source are, and of how many classes, to be kept in the configuration of the run that trains on
    them.

    They may lie anywhere, and as files, archive, array or shards. Raises `UserError` if the run was trained on others.
    """
    saved = read_config(path) if saves(path) else None
    before = saved and saved.get(RECORDS)
    found = identity(source, before) | ({"classes": classes} if classes else {})
    if saved and before is None:
        tell(
            f"--workdir {path}: its {CONFIG} does not tell the records that it was trained on; they are taken for these"
        )
    if saved and before and differences(before, found, ("stamp",)):
        names = ("data", RECORDS)
        here, there = ({name: config.get(name) for name in names} for config in (given | {RECORDS: found}, saved))
        raise UserError(
            f"--workdir {path} holds a run on other records; bring those back, or give another folder:\n"
            + "\n".join(differences(there, here, (f"{RECORDS}.stamp",)))
        )
    return found


@dataclasses.dataclass(frozen=True)
class Remembered:
    """Data that are not there, of which a run remembers the shape, the number of classes, and what else conditions it."""

    data: Any  # to ask whether it is a Dataset would be to ask for its shape
    shape: tuple[int, ...]
    classes: int = 0
    cond: Mapping[str, Any] | None = None

    def train(self) -> Source:
        return self.data.train()

    def test(self) -> Source:
        return self.data.test()


def remembering(experiment: Experiment, run: str, config: dict | None) -> Experiment:
    """The experiment, its records of the shape and classes that a run's configuration tells where the data are not there to
    be asked.

    Raises `UserError`, which calls the run so, where they are, and of another shape.
    """
    records = (config or {}).get(RECORDS) or {}
    shape, classes = records.get("shape"), records.get("classes", 0)
    if shape is None:
        return experiment
    try:
        given, of = experiment.data.shape, classes_of(experiment.data)
    except (UserError, OSError):
        return dataclasses.replace(
            experiment, data=Remembered(experiment.data, tuple(shape), classes, getattr(experiment.data, "cond", None))
        )
    if list(given) != shape:
        raise UserError(f"{run} holds a run on records {tuple(shape)}, and these are {tuple(given)}")
    if of != classes:
        raise UserError(f"{run} holds a run on records of {classes} classes, and these are of {of}")
    return experiment


def saves(path: epath.Path) -> int:
    """How many checkpoints a workdir holds that were saved completely, whole or damaged since."""
    folder = path / "checkpoints"
    return len(Checkpointer(folder).steps()) if folder.exists() else 0


def write_config(path: epath.Path, config: dict) -> None:
    """Save the configuration, atomically."""
    try:
        write_whole(path / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--workdir {path} cannot be written: {error}") from error


def check_space(path: epath.Path, count: int, size: int) -> None:
    """Raise `UserError` where a local disk lacks room for so many checkpoints of `size` bytes, less those that are there."""
    needed, free = max(count - saves(path), 1) * size, free_bytes(path)
    if free < needed:
        raise UserError(
            f"--workdir {path} has {free / 2**20:,.0f} MiB free; {count} checkpoints of {size / 2**20:,.1f} MiB (train.keep "
            f"and the one being written) need {needed / 2**20:,.0f} MiB: make room, or lower train.keep"
        )


def check_shared(path: epath.Path, records: dict | None = None) -> None:
    """Raise `UserError` on every process unless all of them see the configuration, and have the records to train on, that
    process 0 does."""
    try:
        seen = zlib.crc32((path / CONFIG).read_bytes()) >> 1
    except OSError:
        seen = -1
    same = {name: value for name, value in (records or {}).items() if name != "stamp"}  # which tells the times of files
    theirs = zlib.crc32(json.dumps(same, sort_keys=True).encode()) >> 1
    for mine, lost in (
        (seen, f"--workdir {path} is not the same folder on all hosts: process(es) {{}} see another one"),
        (theirs, "the records to train on are not the same on all hosts: process(es) {} have others than process 0"),
    ):
        if others := agree(mine, lambda found: np.flatnonzero(found != found[0]).tolist()):
            raise UserError(lost.format(others))


@contextlib.contextmanager
def reserved(path: epath.Path, training: bool = True, wait: bool = False) -> Iterator[None]:
    """Hold a workdir for this process alone; one that is in use is waited for, or raises `UserError`.

    What is made of checkpoints goes on beside a training, but not two at a time.
    """
    held = path / (".training.lock" if training else ".sampling.lock")

    def busy() -> None:
        user = "run" if training else "command that samples or evaluates it"
        if not wait:
            raise UserError(f"--workdir {path} is in use by another {user}: wait for it, or give another")
        print(f"waiting for another {user}", flush=True)

    with contextlib.ExitStack() as stack:
        try:
            if is_local(path):
                path.mkdir(parents=True, exist_ok=True)
                if not os.access(path, os.W_OK):
                    raise UserError(f"--workdir {path} cannot be written")
            if not stack.enter_context(locked(held, busy)) and training:
                tell(f"--workdir {path}: there are no locks, so nothing keeps a second training out of it")
        except OSError as error:
            raise UserError(f"--workdir {path} cannot be used: {error}") from error
        yield
