"""Checkpoints: written by every host at once while training goes on, verified when they are read.

A step is a folder of items (`train`, `ema`, …: trees of arrays, each restorable alone) and a manifest with the shape,
type and checksum of every array and the configuration of the run. Orbax writes and commits it atomically, but does not
notice a flipped bit: a restore compares the checksums and goes back to the newest step that is whole.

Paths are local, `gs://…` (install `gddim[gcs]`) or `s3://…` (`gddim[s3]`; a commit is no single operation there, and
one that was interrupted counts as damaged).
"""

import contextlib
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from gddim.checksums import checksums
from gddim.errors import UserError, from_extra, harmless
from gddim.parallel import agree
from gddim.storage import free_bytes, is_local

log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run in a folder of their own.

    Keeps the newest `keep_last` steps and, for good, the first at or after each multiple of `keep_every`: every manifest
    lists those, so that no later run deletes them, whatever it keeps itself. Nothing is written before the first `save`.
    With several processes every process makes the same calls, and the folder is one that all of them see.
    Raises `UserError` when the folder holds anything but checkpoints.
    """

    def __init__(self, directory: epath.PathLike, *, keep_last: int = 3, keep_every: int | None = None):
        self.directory = epath.Path(directory)
        if is_local(self.directory):  # `resolve` takes a URL for a relative path
            self.directory = self.directory.resolve()
        self._last, self._every = keep_last, keep_every
        self._for_good: set[int] = set()
        self._manager: Any = None
        self._damaged: set[int] = set()
        if self.directory.exists():
            if not self.directory.is_dir():
                raise UserError(f"checkpoints: {self.directory} is a file, not a folder")
            names = [child.name for child in self.directory.iterdir()]
            other = [name for name in names if not (name.split(".")[0].isdigit() or harmless(name))]
            if other:
                raise UserError(f"checkpoints: {self.directory} holds {other[0]}, no checkpoint: use another folder")

    def any(self) -> bool:
        """Whether process 0 sees a step that was saved completely."""
        return bool(agree(len(self.steps())))

    def steps(self) -> list[int]:
        """The steps that were saved completely, ascending."""
        with from_extra("train"):
            from orbax.checkpoint.utils import checkpoint_steps

        return sorted(checkpoint_steps(self.directory))

    def save(self, step: int, items: dict[str, PyTree], config: dict[str, Any]) -> None:
        """Start to save `items`, trees of arrays by name, and `config`, which JSON can hold.

        Returns when the arrays are copied off the devices; their buffers may then be donated. Errors of the writing
        itself are raised by the next `save`, `wait` or `close`. Saving a state once more is no error.
        Raises `OSError` at once when a local disk has less room than the arrays take.
        """
        with from_extra("train"):
            import orbax.checkpoint as ocp

        if step < 0:
            raise ValueError(f"a step is at least 0, not {step}")
        flat = {name: by_path(tree) for name, tree in items.items()}
        for name, arrays in flat.items():
            for path, leaf in arrays.items():
                if not isinstance(leaf, jax.Array) or leaf.size == 0:  # Orbax would raise in a thread and hang at exit
                    raise TypeError(f"{name}: {path} is {leaf!r:.60}; only arrays with elements can be saved")
        manager = self._open()
        self._for_good |= self._firsts({*manager.all_steps()} - self._damaged | {step})
        summaries = {name: _summary(arrays) for name, arrays in flat.items()}
        manifest = _seal({"config": config, "items": summaries, "kept": sorted(self._for_good)})
        if step in self._damaged:  # it stands where its successor has to go; another one may only have been unreadable
            self._damaged.remove(step)
            if step in manager.all_steps():  # which those that came since may have crowded out
                manager.delete(step)
        if step in manager.all_steps():
            self.wait()
            if self._manifest(step)["items"] == manifest["items"]:
                return
            raise UserError(f"{self.directory} already holds a different step {step}; it is not overwritten")
        self._check_room(sum(leaf.nbytes for arrays in flat.values() for leaf in arrays.values()))
        saves = {name: ocp.args.StandardSave(arrays) for name, arrays in flat.items()}
        with self._writing():
            manager.save(step, args=ocp.args.Composite(manifest=ocp.args.JsonSave(manifest), **saves), force=True)

    def restore(self, items: dict[str, PyTree] | None, step: int | None = None) -> tuple[dict[str, PyTree], int]:
        """The named items of the newest whole step, each array with the sharding that its leaf asks for, and that step.

        Without names all that it holds, item by item, on one device of each process.
        Leaves are arrays or `ShapeDtypeStruct`s with shardings, on any mesh and any number of processes; `{"ema": …}` reads
        the EMA alone, `{"train.model": …}` a part. A damaged step is reported and passed over, on every process alike.
        Raises `UserError` when there is no whole step, when the explicit `step` is not one, or when its arrays are
        those of another model.
        """
        wanted = None if items is None else {name: by_path(tree) for name, tree in items.items()}
        for name, arrays in (wanted or {}).items():
            if bare := [path for path, leaf in arrays.items() if getattr(leaf, "sharding", None) is None]:
                raise TypeError(f"{name}: {bare[0]} has no sharding: where it is to be placed must be said")
        while True:
            left = [each for each in self.steps() if each not in self._damaged and step in (None, each)]
            candidate = int(agree(max(left, default=-1)))
            if candidate < 0:
                what = "no whole checkpoint" + ("" if step is None else f" of step {step}")
                raise UserError(f"{self.directory}: {what} (saved: {self.steps()}, damaged: {sorted(self._damaged)})")
            restored, problem = self._read(candidate, wanted)
            if problem is None:
                return {name: from_paths(tree, restored[name]) for name, tree in (items or restored).items()}, candidate
            self._damaged.add(candidate)
            if jax.process_index() == 0 and candidate in self.steps():  # a run beside this one may have deleted it
                log.warning("checkpoint %s is damaged: %s", self.directory / str(candidate), problem)

    def config(self, step: int) -> dict[str, Any]:
        """The configuration that was saved with a step; raises `UserError` when it cannot be read."""
        try:
            return self._manifest(step)["config"]
        except Exception as error:
            raise UserError(f"checkpoint {self.directory / str(step)}: {_line(error)}") from error

    def wait(self) -> None:
        """Wait until what was saved so far is complete."""
        if self._manager:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then release the threads."""
        manager, self._manager = self._manager, None
        if manager:
            with self._writing():
                manager.close()

    def _check_room(self, size: int) -> None:
        """Raises `OSError` before anything is written: on a full disk Orbax prints a traceback for every array."""
        free = free_bytes(self.directory)
        if agree(free < size, np.any):
            raise OSError(
                f"{self.directory}: no room for a checkpoint of {size / 2**20:,.1f} MiB ({free / 2**20:,.1f} MiB free); "
                "those that are whole remain"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what Orbax raises when a checkpoint cannot be written, a `ValueError` for a full disk, into `OSError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            full = re.search("No space left on device|Disk quota exceeded", str(error))
            reason = full.group() if full else _line(error)
            raise OSError(
                f"{self.directory}: cannot write a checkpoint: {reason}; those that are whole remain"
            ) from error

    def _open(self):
        """The manager that writes; made late, since it makes the folder."""
        with from_extra("train"):
            import orbax.checkpoint as ocp
            from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

        if self._manager is None:
            for step in self.steps():
                with contextlib.suppress(Exception):  # of a damaged manifest; the others list what it did
                    self._for_good |= set(self._manifest(step).get("kept", [step]))  # without a list it may be for good
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(self._last), _Steps(self._for_good)]),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _firsts(self, steps: set[int]) -> set[int]:
        """Those of `steps` that are the first at or after a multiple of `keep_every`."""
        pairs = itertools.pairwise([0, *sorted(steps)])
        return {step for before, step in pairs if step // self._every > before // self._every} if self._every else set()

    def _manifest(self, step: int) -> dict[str, Any]:
        manifest = json.loads((self.directory / str(step) / "manifest" / "metadata").read_text())
        if _seal(manifest) != manifest:
            raise ValueError("the manifest does not match its digest")
        return manifest

    def _read(
        self, step: int, wanted: dict[str, dict[str, Any]] | None
    ) -> tuple[dict[str, dict[str, jax.Array]], str | None]:
        """The arrays of a step, those wanted or all, or why it is damaged."""
        restored, sums, problem = {}, {}, None
        try:
            items = self._manifest(step)["items"]
            for name, arrays in (_shapes(items) if wanted is None else wanted).items():
                item, _, part = name.partition(".")
                prefix = f"{part}." if part else ""
                told = items.get(item, {}).items()
                sums[name] = {path.removeprefix(prefix): each for path, each in told if path.startswith(prefix)}
                _compare(f"{self.directory / str(step)}: {name}", sums[name], arrays)
                restored[name] = _load(self.directory / str(step) / item, arrays, prefix)
        except UserError:
            raise
        except Exception as error:  # whatever tensorstore, zstd or JSON make of damaged bytes
            problem = _line(error)
        if agree(problem is not None, np.any):
            return {}, problem or "another process could not read it"
        for name, arrays in restored.items():
            found = _summary(arrays)
            if bad := [path for path in found if found[path] != sums[name][path]]:
                return {}, f"{name}: the checksum of {bad[0]} and {len(bad) - 1} other array(s) does not match"
        return restored, None


class _Steps:
    """Orbax's policy that preserves these steps, to which more may be added."""

    def __init__(self, steps: set[int]):
        self._steps = steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step in self._steps for checkpoint in checkpoints]


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their names, as a manifest has them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError("two leaves of the tree have one name when its keys are joined by dots")
    return flat


def from_paths(tree: PyTree, arrays: dict[str, Any]) -> PyTree:
    """A tree of this structure of arrays by their names."""
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[path] for path in by_path(tree)])


def _shapes(items: dict[str, dict[str, list]]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """What a manifest tells of, to be placed on one device."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        item: {path: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for path, (shape, dtype, _) in arrays.items()}
        for item, arrays in items.items()
    }


def _seal(manifest: dict[str, Any]) -> dict[str, Any]:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return {**body, "digest": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _compare(where: str, saved: dict[str, list], wanted: dict[str, Any]) -> None:
    """Raises `UserError` unless shapes and types are the same: Orbax would cast, or crop, without a word."""
    asked = {path: [list(x.shape), str(x.dtype)] for path, x in wanted.items()}
    for path in sorted(saved.keys() | asked.keys()):
        ours, theirs = asked.get(path), saved[path][:2] if path in saved else None
        if ours != theirs:
            raise UserError(
                f"{where} is of another model: {path}: saved {theirs or 'nowhere'}, wanted {ours or 'nowhere'}"
            )


def _load(folder: epath.Path, wanted: dict[str, Any], prefix: str = "") -> dict[str, jax.Array]:
    """The arrays of one item, or of the part whose names have a prefix there; each process reads what its devices hold.

    Orbax's own restore would cast and crop without a word, wait for processes that failed, and leave the reads that
    were under way after the first error to print theirs. It writes zarr arrays in an OCDBT store.
    """
    with from_extra("train"):
        import tensorstore as ts

    base = {"driver": "file", "path": f"{folder}/"} if is_local(folder) else f"{folder}/"
    context = ts.Context({"cache_pool": {"total_bytes_limit": 10**8}})  # the store's index, else read for every array
    stores = {
        path: ts.open(
            {"driver": "auto", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{prefix}{path}/"}},
            read=True,
            context=context,
        )
        for path in wanted
    }
    reads = {}
    for path, x in wanted.items():
        store = stores[path].result()
        if store.shape != x.shape or store.dtype.numpy_dtype != x.dtype:
            raise ValueError(f"{path} is {store.dtype.name}{store.shape}, not what the manifest says")
        indices = x.sharding.addressable_devices_indices_map(x.shape).values()
        reads[path] = {key: store[index].read() for key, index in {str(index): index for index in indices}.items()}
    return {
        path: jax.make_array_from_callback(
            x.shape, x.sharding, lambda index, path=path: reads[path][str(index)].result()
        )
        for path, x in wanted.items()
    }


def _summary(arrays: dict[str, jax.Array]) -> dict[str, list]:
    """Shape, type and checksum of each array."""
    totals = checksums(list(arrays.values()))
    return {path: [list(x.shape), str(x.dtype), total] for (path, x), total in zip(arrays.items(), totals, strict=True)}
