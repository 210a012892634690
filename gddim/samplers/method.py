"""How a sample is drawn: a sampler, its budget of network calls and its grid, for any process."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from gddim.errors import UserError
from gddim.samplers.base import Last
from gddim.samplers.grids import power_grid
from gddim.samplers.solver import AbstractSampler, AbstractSolver
from gddim.samplers.words import OnGrid, sampler_name, steps_for
from gddim.sde.base import AbstractLinearSDE, last_time


@dataclasses.dataclass(frozen=True)
class Method:
    """What is drawn with, whatever the process and the model: `solver` makes it a solver of a process.

    `sampler`: a `GDDIM` or another of this package, or your own.
    `nfe`: network calls a sample, that of `last` included. What is left over of them (Heun with an odd number) is not
    spent, and a sampler that chooses its own steps makes as many as it needs: a solution tells the calls made.
    `power`: times are uniform in `t^(1/power)`, from the horizon of the process on, unless the sampler is `OnGrid`.
    `t_min`: the time at which the sampler stops.
    `last`: one more network call, from `t_min` to 0, as in `sample`.
    `start`: the time at which it starts, in place of the horizon: of a state of that time, as of data that were noised.

    >>> method = Method(gddim.GDDIM(order=3, interpolate="data"), nfe=10)
    >>> sde = gddim.CLD()
    >>> solver = method.solver(sde)  # its table is computed once, for any number of states
    >>> solution = solver(lambda u, t: 0.1 * u, np.ones((8, 8, 2, 3)), path=True)
    >>> solution.state.shape, solution.calls, solution.path.states.shape
    ((8, 8, 2, 3), 10, (10, 8, 8, 2, 3))
    """

    sampler: AbstractSampler
    nfe: int
    power: float = 2.0
    t_min: float = 1e-3
    last: Last = "none"
    start: float | None = None

    def grid(self, sde: AbstractLinearSDE) -> Float[np.ndarray, " n"]:
        """The times of as many steps as the calls allow; those of a sampler that chooses its own are the ends.

        Raises `UserError` where one step makes too many calls, `ValueError` for a `t_min` that is not of the process.
        """
        steps, start = steps_for(self.sampler, self.nfe, self.last), sde.horizon if self.start is None else self.start
        return power_grid(start, self.t_min, steps, self.power)

    def solver(self, sde: AbstractLinearSDE) -> AbstractSolver:
        """The solver of a process. Raises like `grid`, and `ValueError` for a process that the sampler is not made for."""
        return self.sampler.solver(sde, self.grid(sde), self.last)

    @property
    def budget(self) -> int | None:
        """`nfe`; None for a sampler that makes the calls that it makes."""
        return self.nfe if self.sampler.nfe(1) is not None else None


def check_methods(methods: Iterable[Method], sde: AbstractLinearSDE) -> None:
    """Raise `UserError` for too few calls, for times outside the process, and for a sampler that the process does not suit.

    Found by making each table with as few steps as make a call.
    """
    methods = list(methods)
    for method in methods:
        steps_for(method.sampler, method.nfe, method.last)
    with np.errstate(all="ignore"):
        try:
            tables = {_least(method, sde): method for method in methods}
        except ValueError as error:
            raise UserError(str(error)) from error
        for (sampler, last, ts), method in tables.items():
            fault, near = _fault(sampler, sde, ts, last), last_time(sde)
            if fault and ts[0] == sde.horizon > near:
                later = _fault(sampler, sde, (near, *ts[1:]), last)
                fault = later or ValueError(
                    f"{sampler_name(method.sampler)} cannot start at {sde.horizon:g}, where nothing is left of the data: "
                    "interpolate them (gddim:3:data), or give the process a horizon below"
                )
            if fault:
                raise UserError(str(fault)) from fault


def _least(method: Method, sde: AbstractLinearSDE) -> tuple[AbstractSampler, Last, tuple[float, ...]]:
    """The sampler of a method, and of its times as few as make a call."""
    sampler, ts = method.sampler, method.grid(sde)
    if isinstance(sampler, OnGrid):
        sampler, ts = sampler.sampler, sampler.times(sde, ts)
    if not np.all(np.diff(ts) < 0):
        raise ValueError(
            f"the times of {sampler_name(method.sampler)} must fall from call to call: {ts.tolist()!s:.80} …"
        )
    middle = len(ts) // 2 if sampler.nfe(1) == 0 else 0
    return sampler, method.last, tuple(ts[sorted({0, middle, len(ts) - 1})].tolist())


def _fault(sampler: AbstractSampler, sde: AbstractLinearSDE, ts: tuple[float, ...], last: Last) -> ValueError | None:
    """What making the table of these times raises."""
    try:
        sampler.solver(sde, ts, last)
    except ValueError as error:
        return error
    return None
