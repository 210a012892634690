"""Files on disks and in buckets: written whole or not at all, folders held by one process, room that is left."""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gddim.errors import UserError, harmless

if TYPE_CHECKING:
    from etils import epath


def write_whole(path: epath.Path, content: bytes) -> None:
    """Write a file such that a kill at any moment, or the `OSError` that names it, leaves the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path)
    try:
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise OSError(f"{path}: {error.strerror or error}; what was there before remains") from error


def check_writable(path: epath.Path) -> None:
    """Raise `OSError` now for a file that could not be written after long work. Leaves its folder behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path)
    new.write_bytes(b"")
    new.unlink()


@contextlib.contextmanager
def all_or_none(*paths: epath.Path) -> Iterator[None]:
    """Of files and folders that are not there yet: when what makes them fails, those that it made are taken away again."""
    new = [path for path in paths if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            path.rmtree() if path.is_dir() else path.unlink(missing_ok=True)
        raise


def check_empty(folder: epath.Path) -> None:
    """Raise `UserError` for a folder that holds something."""
    if folder.exists() and (not folder.is_dir() or any(not harmless(path.name) for path in folder.iterdir())):
        raise UserError(f"{folder} is there already, and is not overwritten: give a new or an empty folder")


def _beside(path: epath.Path) -> epath.Path:
    return path.parent / f".{path.name}.{os.urandom(4).hex()}.new"  # of this writer alone


def mapped(path: os.PathLike[str]) -> memoryview:
    """The bytes of a file, to be looked at; those of a local one take no memory but where they were looked at."""
    if not is_local(path):
        from etils import epath

        return memoryview(epath.Path(path).read_bytes())
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def let_go(array: np.ndarray) -> None:
    """Of a file that is mapped and of which an array is a part, keep nothing in memory until it is looked at again."""
    base: object = array
    while (inner := getattr(base, "base", None)) is not None:
        base = inner
    if isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap):
        base.obj.madvise(mmap.MADV_DONTNEED)  # whatever else was looked at, too


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on this machine, not in a bucket."""
    return "://" not in os.fspath(path)


def free_bytes(path: os.PathLike[str]) -> float:
    """The room on the disk of a folder; a bucket has no end."""
    return float(shutil.disk_usage(path).free) if is_local(path) else math.inf


@contextlib.contextmanager
def locked(path: os.PathLike[str], busy: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Hold a file that is made for it alone among processes; the system releases it however this one ends.

    Where another one has it, `busy` is called, and unless that raises, it is waited for. Buckets have no locks, nor have
    some file systems: nothing is held there, and False is yielded.
    """
    if not is_local(path):
        yield False
        return
    try:  # to be written, as NFS asks of what is locked
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # of another user's
        handle = os.open(path, os.O_RDONLY)
    held = False
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy()
                fcntl.flock(handle, fcntl.LOCK_EX)
            held = True
        yield held
    finally:
        os.close(handle)
