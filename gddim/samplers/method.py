"""How a sample is drawn: a sampler, its budget of network calls and its grid, for any process."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from gddim.errors import UserError
from gddim.samplers.base import Last
from gddim.samplers.grids import power_grid
from gddim.samplers.solver import AbstractSampler, AbstractSolver
from gddim.samplers.words import sampler_name, steps_for
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
        return self._grid(sde, steps_for(self.sampler, self.nfe, self.last))

    def solver(self, sde: AbstractLinearSDE) -> AbstractSolver:
        """The solver of a process. Raises like `grid`, and `ValueError` for a process that the sampler is not made for."""
        return self.sampler.solver(sde, self.grid(sde), self.last)

    @property
    def budget(self) -> int | None:
        """`nfe`; None for a sampler that makes the calls that it makes."""
        return self.nfe if self.sampler.nfe(1) is not None else None

    def _grid(self, sde: AbstractLinearSDE, steps: int) -> Float[np.ndarray, " n"]:
        return power_grid(sde.horizon if self.start is None else self.start, self.t_min, steps, self.power)


def check_methods(methods: Iterable[Method], sde: AbstractLinearSDE) -> None:
    """Raise `UserError` for too few calls, a grid that is none, and a sampler of another process: on as few steps as make a
    call."""
    methods = list(methods)
    for method in methods:
        steps_for(method.sampler, method.nfe, method.last)
    for method in {dataclasses.replace(method, nfe=0) for method in methods}:
        make = lambda grid, method=method: method.sampler.solver(sde, grid, method.last)
        start, steps = last_time(sde), 1 if method.sampler.nfe(1) != 0 else 2
        with np.errstate(all="ignore"):
            try:
                make(power_grid(start, method.t_min, steps, method.power))
            except ValueError as error:
                raise UserError(str(error)) from error
            try:
                if start < sde.horizon:
                    make(method._grid(sde, steps))
            except ValueError as error:
                raise UserError(
                    f"{sampler_name(method.sampler)} cannot start at {sde.horizon:g}, where nothing is left of the data: "
                    "interpolate them (gddim:3:data), or give the process a horizon below"
                ) from error
