"""ArrayRecord shards with a manifest: data sets that do not fit in memory, or that are slow to decode."""

import functools
import hashlib
import io
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Int, Int32, Shaped

from gddim.data.content import digest_of, hexadecimal
from gddim.data.files import digest
from gddim.data.labels import Labelled, class_numbers, classes_of
from gddim.data.sources import LABEL, Dataset, Source, x0_and_cond
from gddim.errors import UserError, from_extra, harmless, progress
from gddim.settings import LATER, MAY_CHANGE
from gddim.storage import locked

_FORMAT = "gddim shards 1"
_MANIFEST = "manifest.json"
_LOCK = ".lock"
_LABELS = "labels_sha256"  # of a shard, in the manifest
_CHUNK = 512
_OPEN = 128  # readers that a thread keeps: four threads stay below the usual limit of 1,024 open files


@dataclass(frozen=True)
class Shards:
    """What `python -m gddim.data prepare` wrote."""

    path: str = field(metadata=MAY_CHANGE)
    """Folder with manifest.json and the shards."""
    labels: bool = field(default=False, metadata=LATER)
    """Whether records have their classes beside them, which they were prepared with."""

    @property
    def shape(self) -> tuple[int, ...]:
        return ShardSource(self._folder, "train").shape

    @property
    def classes(self) -> int:
        if not self.labels:
            return 0
        if classes := (_read_manifest(self._folder) or {}).get("classes"):
            return classes
        raise UserError(
            f"{self._folder} has no labels: prepare it anew, `python -m gddim.data prepare SOURCE DEST --labels`"
        )

    def train(self) -> Source:
        return self._read("train")

    def test(self) -> Source:
        return self._read("test")

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    def _read(self, split: str) -> Source:
        source, classes = ShardSource(self._folder, split), self.classes
        if not classes:
            return source
        labels = class_numbers(source.read_labels(), len(source), self._folder, classes)
        return Labelled(source, labels, source.labelled_digest)


class ShardSource:
    """Records of one split, read at random from its shards."""

    def __init__(self, folder: Path, split: str):
        manifest = _read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} is no folder of shards: python -m gddim.data prepare SOURCE {folder} makes one")
        shards = manifest["splits"][split]
        unfinished = [shard["file"] for shard in shards if not _is_whole(folder, shard)]
        if unfinished:
            raise UserError(f"{folder} lacks {unfinished[0]} or a part of it: run `python -m gddim.data prepare` again")
        self.shape = tuple(manifest["shape"])
        self.dtype = np.dtype(manifest["dtype"])
        self.flip = manifest["flip"]
        self.digest = _sum_of(shards, "records")
        self.labelled_digest = _sum_of(shards, "labelled")
        self._paths = [folder / shard["file"] for shard in shards]
        self._labels = [shard.get(_LABELS) for shard in shards]
        self._begins = np.cumsum([0, *(shard["count"] for shard in shards)])
        self._local = threading.local()

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Shaped[np.ndarray, "b ..."]:
        shards = np.searchsorted(self._begins, indices, side="right") - 1
        rows = indices - self._begins[shards]
        records = b"".join(map(self._read, shards.tolist(), rows.tolist()))
        return np.frombuffer(records, self.dtype).reshape(len(indices), *self.shape)

    def read_labels(self) -> Int32[np.ndarray, " n"]:
        """Those of all records. Raises UserError where they are missing or damaged."""
        try:
            parts = []
            for path, told in zip(map(_labels_of, self._paths), self._labels, strict=True):
                if told not in (None, digest(path, "sha256")):
                    raise ValueError(f"{path.name} is damaged")
                parts.append(np.load(path, allow_pickle=False))
            return np.concatenate([*parts, np.zeros(0, np.int32)])
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"labels of {self._paths[0].parent} cannot be read ({error}): prepare it again") from error

    def _read(self, shard: int, row: int) -> bytes:
        """One record: without read-ahead, and 3 to 5 times as fast on a core as the reader's own list of rows."""
        path = str(self._paths[shard])
        if not hasattr(self._local, "reader"):  # a reader has a position, so each thread has its own
            self._local.reader = functools.lru_cache(_OPEN)(_reader)
        try:
            reader = self._local.reader(path)
            reader.seek(row)
            return reader.read()
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); if it is damaged, prepare it again") from error


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards, finished or not."""
    return (folder / _MANIFEST).is_file()


def _sum_of(shards: list[dict], name: str) -> str | None:
    """The digest of the records of all shards; None where they tell none, as those of earlier versions and those without
    labels do."""
    parts = [shard[name] for shard in shards if name in shard]
    return hexadecimal(sum(int(part, 16) for part in parts)) if len(parts) == len(shards) else None


def _labels_of(shard: Path) -> Path:
    return shard.with_suffix(".labels.npy")


def _reader(path: str) -> Any:
    with from_extra("train"):
        from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")


def prepare(dataset: Dataset, dest: Path, shard_bytes: int = 2**30) -> None:
    """Writes both splits of `dataset` as shards into the folder `dest`, new, empty, or begun by the same call before.

    A shard counts once it is whole and its SHA-256 stands in the manifest; what counts is verified and kept, the rest
    is written. Raises UserError if `dest` holds anything else, or if the disk is full.
    """
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is a file: name a folder")
    if (
        dest.is_dir()
        and _read_manifest(dest) is None
        and [entry for entry in dest.iterdir() if not harmless(entry.name)]
    ):
        raise UserError(f"{dest} holds other files, which are left alone: name a new or empty folder")
    sources = {"train": dataset.train(), "test": dataset.test()}
    plan = _plan(dataset, sources, shard_bytes)
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with locked(dest / _LOCK, functools.partial(_refuse, dest)):
            manifest = _continued(plan, _read_manifest(dest), dest)
            _write_manifest(dest, manifest)
            for split, source in sources.items():
                with progress(total=len(source), desc=split, unit=" records") as bar:
                    begin = 0
                    for shard in manifest["splits"][split]:
                        path, rows = dest / shard["file"], range(begin, begin + shard["count"])
                        if not (_is_whole(dest, shard) and _is_verified(path, shard)):
                            shard |= _write_shard(path, source, rows, bar)
                            shard["bytes"], shard["sha256"] = path.stat().st_size, digest(path, "sha256")
                            _write_manifest(dest, manifest)
                        begin = rows.stop
                        bar.update(begin - bar.n)
    except (OSError, RuntimeError) as error:  # the writer's own errors, as that of a full disk, are RuntimeErrors
        raise UserError(f"cannot write {dest} ({error}): mend that, then run the same command to go on") from error


def _refuse(dest: Path) -> NoReturn:
    raise UserError(f"another process writes in {dest}: wait for it, or name another folder")


def _plan(dataset: Dataset, sources: dict[str, Source], shard_bytes: int) -> dict:
    """The manifest before anything is written: shards of about `shard_bytes`, none of them there yet."""
    shape, dtype = sources["train"].shape, sources["train"].dtype
    if (held := (sources["test"].shape, sources["test"].dtype)) != (shape, dtype):
        raise UserError(f"records to train on are {dtype} {shape}, but those held out are {held[1]} {held[0]}")
    per_shard = max(1, shard_bytes // max(1, int(np.prod(shape)) * dtype.itemsize))
    splits = {
        split: [
            {"file": f"{split}-{number:05}.array_record", "count": min(per_shard, len(source) - begin), "sha256": None}
            for number, begin in enumerate(range(0, len(source), per_shard))
        ]
        for split, source in sources.items()
    }
    counts = {split: len(source) for split, source in sources.items()}
    classes = classes_of(dataset)
    return {
        "format": _FORMAT,
        "source": repr(dataset),
        "shape": list(shape),
        "dtype": dtype.name,
        "flip": sources["train"].flip,
        "counts": counts,
        **({"classes": classes} if classes else {}),
        "content": {split: _sample(source) for split, source in sources.items()},
        "splits": splits,
    }


def _continued(plan: dict, old: dict | None, dest: Path) -> dict:
    """The manifest to go on from: the old one, if it began the same plan."""
    if old is None:
        return plan
    for key in ("shape", "dtype", "flip", "counts", "classes", "content"):  # wherever the source lies now
        if old.get(key) != plan.get(key):
            raise UserError(
                f"{dest} was begun with {key} {old.get(key)}, not {plan.get(key)}: delete it or name another folder"
            )
    return old


def _sample(source: Source) -> str:
    """A digest of 64 records, by which other content of the same shape is noticed."""
    records = source[np.linspace(0, len(source) - 1, min(len(source), 64)).astype(int)]
    x0, cond = x0_and_cond(records)
    if set(cond or {}) - {LABEL} or (cond and (cond[LABEL].dtype, cond[LABEL].ndim) != (np.int32, 1)):
        kinds = ", ".join(f"{name} {values.dtype}" for name, values in records.items())
        raise UserError(f"shards hold one array a record, and its label, an int32; these are {kinds}")
    parts = [x0, *(cond or {}).values()]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:16]


def _write_shard(path: Path, source: Source, rows: range, bar: Any) -> dict[str, str]:
    """Writes the records of these rows, and returns what they add to the digest of all, without labels and with them, and
    the SHA-256 of the file of labels."""
    with from_extra("train"):
        from array_record.python.array_record_module import ArrayRecordWriter

    part = path.with_name(path.name + ".part")
    writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")  # photographs hardly compress
    alone, labelled, labels = 0, 0, []
    try:
        for begin in rows[::_CHUNK]:
            records = source[np.arange(begin, min(begin + _CHUNK, rows.stop))]
            x0, cond = x0_and_cond(records)
            for record in x0:
                writer.write(record.tobytes())
            alone += digest_of(x0, begin)
            if cond:
                labelled += digest_of(records, begin)
                labels.append(cond[LABEL])
            bar.update(len(x0))
    finally:
        writer.close()
    if labels:
        content = io.BytesIO()
        np.save(content, np.concatenate(labels), allow_pickle=False)
        _labels_of(path).write_bytes(content.getvalue())
    part.replace(path)
    told = {"labelled": hexadecimal(labelled), _LABELS: digest(_labels_of(path), "sha256")} if labels else {}
    return {"records": hexadecimal(alone), **told}


def _is_whole(folder: Path, shard: dict) -> bool:
    path = folder / shard["file"]
    if "labelled" in shard and not _labels_of(path).is_file():
        return False
    return shard["sha256"] is not None and path.is_file() and path.stat().st_size == shard["bytes"]


def _is_verified(path: Path, shard: dict) -> bool:
    """Whether records, and labels, are by their SHA-256 what was written; earlier releases kept none of labels."""
    labels = _LABELS not in shard or digest(_labels_of(path), "sha256") == shard[_LABELS]
    return labels and digest(path, "sha256") == shard["sha256"]


def _read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder of shards, None where there is none."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / _MANIFEST} cannot be read ({error})") from error
    keys = {"source", "shape", "dtype", "flip", "counts", "splits"}
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT or not keys <= manifest.keys():
        raise UserError(f"{folder / _MANIFEST} is not a manifest of format '{_FORMAT}'")
    return manifest


def _write_manifest(folder: Path, manifest: dict) -> None:
    part = folder / f".{_MANIFEST}.part"  # hidden, so that a folder of nothing else counts as empty
    with open(part, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / _MANIFEST)
