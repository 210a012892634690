"""Files that a verb leaves in the workdir; each tells inside what it was made from, so that none is lost."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import PyTree, Shaped

from gddim.errors import UserError
from gddim.evaluation.figures import KEY, SUFFIXES, description_in, encode
from gddim.evaluation.page import REPORT, check_page
from gddim.experiment.checkpoints import checkpoint_digest
from gddim.experiment.config import Experiment
from gddim.experiment.sampling import Sampling
from gddim.experiment.workdir import describe
from gddim.parallel import tell
from gddim.samplers import LearnedTable
from gddim.storage import write_whole


def write_figure(path: epath.Path, figure: Any, origin: dict[str, Any]) -> None:
    """A figure as `path`.png, and a plot as .svg and .pdf too; see `make_room` for what happens to files that are there."""
    for suffix in SUFFIXES[:1] if figure.images else SUFFIXES:
        content = encode(figure, suffix, json.dumps(origin))
        file = path.with_name(f"{path.name}{suffix}")  # a name may have a dot of its own, as restored-sense-0.25
        make_room(file, origin)
        write_whole(file, content)


def write_npz(
    path: epath.Path, samples: Shaped[np.ndarray, "n ..."], origin: dict[str, Any], labels: np.ndarray | None = None
) -> None:
    """Samples, and their classes; see `make_room` for what happens to a file that is there."""
    buffer, arrays = io.BytesIO(), {"samples": samples, "gddim": np.array(json.dumps(origin))}
    np.savez_compressed(buffer, allow_pickle=False, **arrays | ({} if labels is None else {"labels": labels}))
    make_room(path, origin)
    write_whole(path, buffer.getvalue())


def write_json(path: epath.Path, told: dict[str, Any], origin: dict[str, Any]) -> None:
    """What a verb found; see `make_room` for what happens to a file that is there."""
    make_room(path, origin)
    write_whole(path, (json.dumps(told | {KEY: origin}, indent=2) + "\n").encode())


def origin_of_network(experiment: Experiment, step: int, params: PyTree, sampling: Sampling) -> dict[str, Any]:
    """What decides what a verb makes: the network, by its parameters, and how it draws; the verb adds what it is given.

    Tells of a table that was fitted for other parameters.
    """
    digest, sampler = checkpoint_digest(params), sampling.sampler
    origin = {"experiment": experiment.name, "step": step, "checkpoint": digest}
    if isinstance(sampler, LearnedTable):
        origin["table"] = sampler.stored.digest
        if line := sampler.foreign(digest):
            tell(line)
    return origin | describe(sampling)


def digest_of_data(data: Shaped[np.ndarray, "n ..."]) -> str:
    """Tells apart in an origin what was given."""
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()[:16]


def make_room(path: epath.Path, origin: dict[str, Any]) -> None:
    """Let `path` be written: a file of the same origin is replaced, one of another is kept as `NAME-1`, `NAME-2`, ….

    Raises `UserError` for a file that no verb wrote.
    """
    if origin_of(path) in (None, origin):
        return
    others = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, 10**6))
    path.rename(next(other for other in others if not other.exists()))


def origin_of(path: epath.Path) -> dict[str, Any] | None:
    """What a file was made from; None if there is none. Raises `UserError` for a file that no verb wrote."""
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                return json.loads(str(file[KEY]))
        if path.suffix == ".json":
            return json.loads(content).get(KEY, {})  # likelihood.json and classes.json of earlier releases have none
        return json.loads(description_in(content, path.suffix))
    except Exception as error:  # whatever a reader makes of a file that is not what its name says
        raise UserError(f"{path} was not written by this program and is not overwritten: move it away") from error


def check_names(workdir: epath.Path, name: str, *figures: str) -> None:
    """Raise `UserError` if one of these, an .npz and a .json file and figures, or the page of the run is there and no verb
    wrote it."""
    for path in (
        workdir / f"{name}.npz",
        workdir / f"{name}.json",
        *(workdir / f"{figure}{suffix}" for figure in figures for suffix in SUFFIXES),
    ):
        origin_of(path)
    check_page(workdir / REPORT)
