"""What the tests of data sets share."""

import numpy as np


def records(source):
    """All records of a source."""
    return source[np.arange(len(source))]


def pixels(seed, *shape):
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def files_below(folder):
    """The files of a folder and its subfolders, by relative path."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
