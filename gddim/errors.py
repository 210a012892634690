"""What all command lines share: the one exception for what a user can mistype or misplace, paths, and what prints."""

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etils import epath

_EXTRAS = {"gs": "gcs", "s3": "s3"}


class UserError(ValueError):
    """Bad input: the message is one line that says what was given and what is accepted.

    The command line prints it and exits with status 2.
    """


class MissingWeights(UserError):
    """Weights that only an evaluation needs are not there."""


def place(text: str) -> "epath.Path":
    """The path that a command line names, local or in a bucket. Raises `UserError` without the package for the latter."""
    from etils import epath

    path = epath.Path(text).expanduser()
    scheme, bucket, _ = text.partition("://")
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
