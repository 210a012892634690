"""Tables that were learned: read from a file, for one process, one grid and one number of calls."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from typing import Any, cast

import equinox as eqx
import numpy as np

from gddim.errors import UserError, place
from gddim.samplers.base import Coefficients, Last
from gddim.samplers.grids import check_grid
from gddim.samplers.solver import AbstractSampler, TableSolver
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.words import process_name

ABOUT = "gddim"  # in the file, where the table comes from, as JSON
NEEDED = {"process", "network", "nfe"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds, told from others by its digest."""

    digest: str
    table: Coefficients = dataclasses.field(compare=False, repr=False)
    about: dict[str, Any] = dataclasses.field(compare=False, repr=False)


class LearnedTable(AbstractSampler):
    """A table from a file, as `python -m experiments.NAME fit` writes it: an ordinary table for the one loop.

    It makes its own calls on its own grid, whatever number of steps it is told, and is of one process.

    `file`: as it was named; `stored`: what is in it.
    """

    file: str = eqx.field(static=True)
    """As it was named."""
    stored: Stored = eqx.field(static=True)
    """What is in it."""

    @property
    def about(self) -> dict[str, Any]:
        """Where it comes from: the digest of its `network`, its `process`, its calls `nfe`, its losses, the commit, …"""
        return self.stored.about

    def nfe(self, steps: int) -> int:
        return len(self.stored.table.times)

    def solver(self, sde: AbstractLinearSDE, ts: Any, last: Last = "none") -> TableSolver:
        """Of its own grid. Raises `ValueError` for another process, and where `ts` starts or ends elsewhere."""
        ts, table = check_grid(sde, ts, data=True), self.stored.table
        if not self.of(sde):
            raise ValueError(f"table:{self.file} was fitted for {self.about['process']}, not for {process_name(sde)}")
        if not np.isclose(ts[-1], table.ts[-1], rtol=1e-6, atol=0):
            raise ValueError(f"table:{self.file} ends at t_min {table.ts[-1]:g}, not at {ts[-1]:g}")
        if not np.isclose(ts[0], table.ts[0], rtol=1e-6, atol=0):
            raise ValueError(f"table:{self.file} starts at {table.ts[0]:g}, not at {ts[0]:g}")
        return TableSolver.of(table, sde, last)

    def of(self, sde: AbstractLinearSDE) -> bool:
        """Whether it is of this process."""
        return self.about["process"] == process_name(sde)

    def foreign(self, network: str | None, rounded_from: str | None = None) -> str:
        """A line where it was fitted for another network than that of this digest, or the one it was rounded from; else
        nothing."""
        if network is None or self.about["network"] in (network, rounded_from):
            return ""
        return (
            f"table:{self.file} was fitted for the network {self.about['network']}, and this is {network}: fit one for it, "
            "unless they are near relatives"
        )


def load_table(file: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> LearnedTable:
    """The sampler in a file that `python -m experiments.NAME fit` wrote.

    `file`: local or in a bucket; or, where there is none, the NAME of `folder`/NAME.npz.

    Returns a sampler for one process, with a grid and calls of its own: `gddim.sample` wants of its grid the ends alone.
    Raises `UserError` for a file that is not there, or is another.
    """
    path = place(os.fspath(file))
    try:
        named = place(os.fspath(folder)) / f"{file}.npz" if folder is not None and not path.exists() else path
        content = (named if named.exists() else path).read_bytes()
    except OSError as error:
        raise UserError(f"table:{file}: {error.strerror or error}; give a file that fit wrote") from error
    return decode(content, os.fspath(file))


def encode(table: Coefficients, about: dict[str, Any]) -> bytes:
    """A table and where it comes from, as a file; arrays to the last bit."""
    arrays: dict[str, Any] = {name: value for name, value in vars(table).items() if value is not None}
    buffer, save = io.BytesIO(), cast("Any", np.savez)  # whose stubs take any array for an option
    save(buffer, **arrays | {ABOUT: np.array(json.dumps(about))})
    return buffer.getvalue()


def decode(content: bytes, file: str) -> LearnedTable:
    """What `encode` made; `file` is what it is called. Raises `UserError` for anything else."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        about = json.loads(str(arrays.pop(ABOUT)))
        if missing := NEEDED - set(about):
            raise ValueError(f"it does not tell its {min(missing)}")
        table = Coefficients(**arrays)
    except Exception as error:  # whatever NumPy makes of another file
        raise UserError(f"table:{file} is no table that fit wrote: {error}") from error
    return LearnedTable(file, Stored(hashlib.sha256(content).hexdigest()[:16], table, about))
