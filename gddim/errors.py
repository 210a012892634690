"""What all command lines share: the one exception for what a user can mistype, misplace or lack, paths, and what prints."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from etils import epath

_EXTRAS = {"gs": "gcs", "s3": "s3"}


class UserError(ValueError):
    """Bad input: the message is one line that says what was given and what is accepted.

    The command line prints it and exits with status 2.
    """


def require(good: bool, message: str) -> None:
    """Raise `UserError` with a message that says what was given and what is accepted."""
    if not good:
        raise UserError(message)


class MissingWeights(UserError):
    """Weights that only an evaluation needs are not there."""


@contextlib.contextmanager
def from_extra(name: Literal["train", "eval"]) -> Iterator[None]:
    """Around the import of what an extra of this package brings: without it, one `UserError` names the extra.

    >>> with from_extra("eval"):
    ...     import diffrax
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error}: pip install 'gddim[{name}]'") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether what Python or JAX raised says that the memory of the host or of a device is full."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def exit_status(action: Callable[[], object], full: str, stopped: str) -> int:
    """That of a command which does `action`; what is wrong is a line of standard error, with `full` where memory is, and
    with `stopped` after Ctrl-C.
    """
    try:
        action()
        return 0
    except (UserError, OSError) as error:
        status, said = 2, f"error: {error}"
    except (MemoryError, RuntimeError) as error:  # as JAX's are
        if not out_of_memory(error):
            raise
        status, said = 1, f"error: out of memory: {full}"
    except KeyboardInterrupt:
        status, said = 130, f"interrupted: {stopped}"
    print(said, file=sys.stderr)
    return status


def progress(*arguments: Any, **options: Any) -> Any:
    """A bar of tqdm's, on a terminal alone."""
    with from_extra("eval"):
        from tqdm import tqdm

    return tqdm(*arguments, disable=None, **options)


def place(text: "str | os.PathLike[str]") -> "epath.Path":
    """The path that a user names, local or in a bucket. Raises `UserError` without the package for the latter."""
    from etils import epath

    path = epath.Path(text).expanduser()
    scheme, bucket, _ = os.fspath(text).partition("://")
    if bucket:
        try:
            path.exists()
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            raise UserError(
                f"{text}: {error}" + (f": pip install 'gddim[{extra}]', or give a local path" if extra else "")
            ) from error
    return path


def harmless(name: str) -> bool:
    """Whether a file of this name is nobody's work, so that a folder with it counts as empty: what file managers,
    notebooks and file systems leave behind, which is hidden or one of a few names.
    """
    return name.startswith(".") or name in ("lost+found", "Thumbs.db", "desktop.ini", "@eaDir", "__MACOSX")


def printable() -> None:
    """From now on print `?` for what the terminal's encoding lacks, where Python would end in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
