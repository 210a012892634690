"""A table of metrics over samplers and network calls: each cell computed once, resumable at any moment."""

import io
import json
import os
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from gddim.errors import UserError, from_extra, progress
from gddim.evaluation.cell import Cell, Evaluator, Row, check, digest_of
from gddim.evaluation.statistics import OF_CLASS, Statistics, compare
from gddim.parallel import agree
from gddim.samplers.words import sampler_name
from gddim.sde.words import process_name
from gddim.storage import write_whole

FLOOR = "data"  # the sampler of the row that compares data with data
RESULTS = "results.jsonl"
_NEEDED = {
    "cell": {"sampler", "nfe", "samples", "seed"},
    "provenance": {"process", "features", "reference"},
    "metrics": set(),
    "measured": {"nfe"},
}


def sweep(
    evaluator: Evaluator,
    cells: Sequence[Cell],
    folder: os.PathLike,
    floor: Statistics | None = None,
    keep_samples: bool = False,
    save_every: float = 30.0,
) -> list[Row]:
    """The rows of all cells, in order; those already in `folder/results.jsonl` with the same provenance are kept.

    A row is written when its cell is done, the progress inside a cell at most every `save_every` seconds: however
    it is interrupted, calling it again ends with the same rows. `keep_samples` writes the samples of each cell to
    `folder/samples/KEY` and its row beside them, drawing them again where only the row is there. `floor` adds a row that
    compares other data with the reference, which is as good as a sampler can be. Raises `UserError` before anything is drawn.
    """
    folder = epath.Path(folder)
    results = folder / RESULTS
    there = lambda: {digest_of(row): row for row in read_rows(results)} if results.exists() else {}
    known = there()

    def add(row: Row) -> None:
        known[digest_of(row)] = row
        if jax.process_index() == 0:  # beside rows that others have added since: in a bucket nothing is locked
            rows = there() | {digest_of(row): row}
            write_whole(results, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())

    named = {digest_of(evaluator.key(cell)): cell for cell in cells}
    told = lambda key: folder / "samples" / f"{key}.json"  # there when the samples of a cell are: what they are
    done = lambda key: key in known and (not keep_samples or told(key).exists())
    seen = agree(np.array([done(key) for key in named], bool))  # by process 0: all draw the same cells
    missing = {key: named[key] for key, there in zip(named, seen, strict=True) if not there}
    check(list(missing.values()), evaluator.model.sde)
    wanted = list(named)
    if floor is not None:
        row = _floor_row(evaluator, floor)
        wanted.insert(0, digest_of(row))
        if wanted[0] not in known:
            add(row | {"metrics": compare(floor, evaluator.reference, evaluator.space.metrics)})
    several = len({cell.sde and process_name(cell.sde) for cell in cells}) > 1
    work = sum(cell.samples * cell.method.nfe for cell in missing.values())
    with progress(total=work, unit="call", unit_scale=True) as bar:
        for key, cell in missing.items():
            told_as = sampler_name(cell.method.sampler)
            if several and cell.sde:
                told_as += f", {process_name(cell.sde)}"
            bar.set_description(f"{told_as} at {cell.method.nfe} calls, seed {cell.seed}")
            state = folder / "cells" / f"{key}.npz"
            keep = _Keeper(folder / "samples" / key) if keep_samples else None
            row = evaluator.run(cell, state, save_every, keep, lambda n, nfe=cell.method.nfe: bar.update(n * nfe))
            if key not in known:
                add(row)
            if jax.process_index() == 0:
                if keep:
                    write_whole(told(key), (json.dumps(row, indent=1) + "\n").encode())
                for left in (state, *state.parent.glob(f".{state.name}.*.new")):  # those that a kill has cut short, too
                    left.unlink(missing_ok=True)
                found = ", ".join(
                    f"{name} {value:.4g}" for name, value in row["metrics"].items() if not name.startswith(OF_CLASS)
                )
                found = found or f"diverged, {row['measured']['not_finite']} are not finite"
                bar.write(f"{told_as}, NFE {row['measured']['nfe']:g}: {found}")
    return [known[key] for key in wanted if key in known]  # all of them on process 0


def _floor_row(evaluator: Evaluator, floor: Statistics) -> Row:
    cell = {"sampler": FLOOR, "nfe": 0, "samples": floor.count, "seed": 0, **floor.origin, "digest": floor.digest()}
    return {"cell": cell, "provenance": evaluator.origin, "measured": {}}


def read_rows(path: os.PathLike) -> list[Row]:
    """The rows of a results file. Raises `UserError` for what is none."""
    try:
        rows = [json.loads(line) for line in epath.Path(path).read_text().splitlines()]
        for row in rows:
            for part, needed in _NEEDED.items():
                optional = {"nfe"} if part == "measured" and row["cell"]["sampler"] == FLOOR else set()
                if missing := needed - optional - row[part].keys():
                    raise ValueError(f"the {part} of a row lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results that can be read: {error}") from error
    return rows


class _Keeper:
    """Writes samples by number: images of 1 or 3 channels as a PNG each, anything else as an npz for each batch."""

    def __init__(self, folder: epath.Path):
        self._folder, self._begun = folder, False
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, first: int, samples: np.ndarray) -> None:
        with from_extra("eval"):
            from PIL import Image

        if jax.process_index():
            return
        if not self._begun:  # batches of another size may have got further before they were interrupted
            for path in self._folder.glob("*.npz"):
                if int(path.stem) >= first:
                    path.unlink()
        self._begun = True
        if samples.dtype != np.uint8 or samples.shape[-1] not in (1, 3):
            buffer = io.BytesIO()
            np.savez(buffer, samples=samples)
            write_whole(self._folder / f"{first:06d}.npz", buffer.getvalue())
            return
        for i, x in enumerate(samples, first):
            buffer = io.BytesIO()
            Image.fromarray(x.squeeze(-1) if x.shape[-1] == 1 else x).save(buffer, "PNG")
            (self._folder / f"{i:06d}.png").write_bytes(buffer.getvalue())
