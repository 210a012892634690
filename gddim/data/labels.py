"""Classes of records: beside a source that has none, read of a folder of images, and checked."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Shaped

from gddim.data.sources import DATA, LABEL, ArraySource, Records, Source, x0_and_cond
from gddim.errors import UserError

MOST = 2**16  # classes: a larger number is no class
_FEW = 3


def class_numbers(
    labels: Shaped[np.ndarray, "..."], count: int, where: object, classes: int = MOST
) -> Int32[np.ndarray, " {count}"]:
    """Labels as int32. Raises UserError unless there is one of 0 … classes − 1 for each of `count` records."""
    kind, wanted = f"{labels.dtype} {labels.shape}", f"({count},), one of a record"
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{where}: labels must be whole numbers {wanted}, not {kind}")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise UserError(
            f"{where}: labels must be 0 to {classes - 1:,}, and {int(wrong.sum()):,} of {count:,} are not: record "
            f"{wrong.argmax():,} has {labels[wrong.argmax()]}"
        )
    return labels.astype(np.int32)


def with_labels(source: Source, labels: Int32[np.ndarray, " n"]) -> Source:
    """Records of data alone, each with its label beside it."""
    if isinstance(source, ArraySource) and source.rows is None:
        return ArraySource({DATA: source.array, LABEL: labels}, source.flip)
    return Labelled(source, labels)


class Labelled:
    """The records of a source that is read, each with its label beside it."""

    def __init__(self, source: Source, labels: Int32[np.ndarray, " n"], digest: str | None = None):
        self.labels, self.digest, self._source = labels, digest, source
        self.shape, self.dtype, self.flip = source.shape, source.dtype, source.flip

    @property
    def stamp(self) -> str | None:
        stamp = getattr(self._source, "stamp", None)
        return stamp and f"{stamp} {hashlib.sha256(self.labels.tobytes()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Records:
        return {DATA: self._source[indices], LABEL: self.labels[indices]}


def classes_of(data: Any) -> int:
    """How many classes the records of a data set have; 0 where they have no labels."""
    return getattr(data, "classes", 0)


def cond_of(data: Any) -> Mapping[str, Any] | None:
    """An example of what stands beside the data of a record; None where nothing does."""
    return getattr(data, "cond", None) or ({LABEL: np.int32(0)} if classes_of(data) else None)


def class_counts(source: Source, classes: int) -> Int[np.ndarray, " {classes}"]:
    """How many records there are of each class."""
    if isinstance(source, Labelled):
        labels = [source.labels]
    else:
        parts = np.array_split(np.arange(len(source)), -(-len(source) // 1024))
        labels = [x0_and_cond(source[part])[1][LABEL] for part in parts]  # pyright: ignore[reportOptionalSubscript]
    return np.bincount(np.concatenate(labels), minlength=classes)


def check_labels(data: Any, source: Source, where: str) -> None:
    """Raise UserError unless the labels of a data set of classes are those of classes, as far as they are in memory, or
    those of its first record."""
    if not (classes := classes_of(data)):
        return
    cond = source.cond if isinstance(source, ArraySource) else x0_and_cond(source[np.arange(min(1, len(source)))])[1]
    if LABEL not in (cond or {}):
        raise UserError(f"{where}: records of {classes} classes need a {LABEL!r}")
    class_numbers(np.asarray(cond[LABEL]), len(cond[LABEL]), where, classes)  # pyright: ignore[reportOptionalSubscript]


# Of a folder of images.

TABLES = ("dataset.json", "labels.csv")
"""Files that tell the classes of the images beside and below them: EDM's, and one of lines `name,class`."""


def table_of(names: Sequence[str], tables: Sequence[str]) -> str | None:
    """Of files that may tell the classes of images the first that stands beside, or above, all of them."""
    above = sorted(tables, key=lambda table: (table.count("/"), TABLES.index(PurePosixPath(table).name)))
    return next((table for table in above if all(name.startswith(_folder(table)) for name in names)), None)


def _folder(name: str) -> str:
    """What comes before the last part of a name: "" or "path/of/folders/"."""
    return name[: name.rfind("/") + 1]


def image_classes(names: Sequence[str], table: str | None, content: bytes, where: Path) -> dict[str, int]:
    """The class of every image, by name: what a table says, else a number for each folder, or UserError.

    A table is of whole numbers, classes as they are, or of words that are none; words, and folders, are numbered in their
    order, folders that are numbers in that of these. Folders are those just below the one that holds all images.
    """
    if table is None:
        shared = len(PurePosixPath(os.path.commonpath([f"{PurePosixPath(name).parent}" for name in names])).parts)
        folders = {name: PurePosixPath(name).parts[:-1] for name in names}
        told = {name: parts[shared] for name, parts in folders.items() if len(parts) > shared}
        needed = f"give each a folder of its class, or tell them in {' or '.join(TABLES)}"
    else:
        told: dict[str, str] = {}
        for name, word in (
            _from_json(content, where / table) if table.endswith(".json") else _from_csv(content, where / table)
        ):
            if word and told.setdefault(file := _folder(table) + name, word) != word:
                raise UserError(f"{where / table} tells {name} twice, as {told[file]} and as {word}")
        needed = f"{table} must tell those of all"
    if missing := [name for name in names if name not in told]:
        few = ", ".join(missing[:_FEW]) + ", …" * (len(missing) > _FEW)
        raise UserError(f"{where}: {len(missing):,} of {len(names):,} images have no label ({few}): {needed}")
    words = [told[name][:255] for name in names]  # more digits than Python reads are no number
    numeric = [word for word in words if table and _number(word)]
    whole = len(numeric) > 0
    if whole and (odd := [word for word in words if not _whole(word)]):
        found = " and ".join(dict.fromkeys([numeric[0], odd[0]]))
        raise UserError(f"{where / (table or '')}: labels must be all whole numbers, or all words, not {found}")
    order = {word: i for i, word in enumerate(sorted(set(words), key=_natural))}
    numbers = np.array([max(-1, min(int(word), MOST)) if whole else order[word] for word in words])
    return dict(zip(names, class_numbers(numbers, len(names), where / (table or "")).tolist(), strict=True))


def _from_json(content: bytes, where: Path) -> list[tuple[str, str]]:
    try:
        labels = json.loads(content)["labels"]
        pairs = labels.items() if isinstance(labels, Mapping) else labels or []
        if odd := [label for _, label in pairs if not isinstance(label, int | str) or isinstance(label, bool)]:
            raise ValueError(f"label {odd[0]}")
        return [(name.replace("\\", "/"), str(label)) for name, label in pairs]
    except Exception as error:  # whatever JSON and other shapes of it raise
        raise UserError(
            f'{where} must be {{"labels": [["name.png", 3], …]}}; it cannot be read ({error!r:.100})'
        ) from error


def _from_csv(content: bytes, where: Path) -> list[tuple[str, str]]:
    lines = csv.reader(io.StringIO(content.decode("utf-8-sig", errors="replace")))
    try:
        return [(line[0].strip().replace("\\", "/"), line[1].strip()) for line in lines if len(line) > 1]
    except csv.Error as error:  # as a quote that is not closed
        raise UserError(f"{where} cannot be read: {error}") from error


def _number(word: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d*)?", word) is not None


def _whole(word: str) -> bool:
    return word.removeprefix("-").isdecimal()


def _natural(word: str) -> tuple[bool, int, str]:
    return not _whole(word), int(word) if _whole(word) else 0, word
