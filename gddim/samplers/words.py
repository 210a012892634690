"""Samplers and grids by name, as a command line and a table spell them."""

import dataclasses
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Float

from gddim.errors import UserError
from gddim.samplers.adams import GDDIM
from gddim.samplers.base import Last
from gddim.samplers.baselines import RK45, SSCS, CholeskyMultistep, EulerMaruyama, Heun
from gddim.samplers.grids import (
    DATA_STD,
    band_grid,
    check_grid,
    karras_grid,
    log_snr_grid,
    power_grid,
    scaled,
    tuned_grid,
    two_phase_grid,
    uniform_grid,
)
from gddim.samplers.learned import LearnedTable, load_table
from gddim.samplers.peers import IPNDM, AnalyticStart, DPMSolver, UniPC
from gddim.samplers.repaint import RePaint
from gddim.samplers.solver import AbstractSampler, AbstractSolver, AbstractTableSampler, count_calls
from gddim.sde import VP, AbstractLinearSDE

_FORMS = {
    "gddim": GDDIM, "cholesky": CholeskyMultistep, "em": EulerMaruyama, "heun": Heun, "sscs": SSCS, "rk45": RK45,
    "ipndm": IPNDM, "dpm": DPMSolver, "unipc": UniPC, "repaint": RePaint,
}  # fmt: skip
_WORDS = {
    "eps": ("interpolate", "eps"), "data": ("interpolate", "data"), "residual": ("interpolate", "residual"),
    "corrector": ("corrector", True), "free": ("corrector", "free"),
    "bh1": ("variant", "bh1"), "bh2": ("variant", "bh2"),
}  # fmt: skip
_COUNT = "order"  # what a number alone sets
_COUNTS = {_COUNT, "repeats"}  # by its name in the sampler
ACCEPTED = (
    "gddim[:ORDER][:data|:residual][:free|:corrector][:lam=λ][:data_std=…], cholesky[:ORDER], em[:lam=λ], heun, sscs, "
    "rk45[:rtol=…][:atol=…], ipndm[:ORDER], dpm[:ORDER] (DPM-Solver++), unipc[:ORDER][:bh1], repaint[:REPEATS][:lam=λ], "
    "or afs:SAMPLER, whose first step is analytic; any of them @GRID; or table:FILE, which fit wrote; for example "
    "gddim:3:data:free@tuned or em:lam=1"
)


TABLE = "table:"  # a file's name follows
UNIT = "data_std="  # a number follows


def parse_sampler(text: str, tables: str | None = None) -> AbstractSampler:
    """The sampler that a word such as `gddim:3:data` names, or, with its grid, `gddim:3:data:free@tuned`; or `table:FILE`, or
    `table:NAME` of the folder `tables`.

    Raises `UserError` that lists what is accepted.
    """
    before, table, file = text.strip().partition(TABLE)
    if table and before:
        raise UserError(f"sampler {text!r}: a table is whole as it is; accepted are {ACCEPTED}")
    if table:
        return load_table(file, tables)
    text, on, grid = text.partition("@")
    if on:
        return OnGrid(parse_sampler(text), parse_grid(grid))
    name, *options = text.strip().lower().split(":")
    if name == "afs" and options:
        return AnalyticStart(_table(parse_sampler(":".join(options)), text))
    if name not in _FORMS:
        raise UserError(f"unknown sampler {text!r}; accepted are {ACCEPTED}")
    known = {field.name for field in dataclasses.fields(_FORMS[name])}
    arguments: dict[str, Any] = {}
    for option in options:
        argument, value = _argument(option)
        argument = next(iter(known & _COUNTS), "") if argument == _COUNT else argument
        if argument not in known or argument in arguments:
            why = f"{option!r} sets {argument} again" if argument in arguments else f"{name} has no option {option!r}"
            raise UserError(f"sampler {text!r}: {why}; accepted are {ACCEPTED}")
        arguments[argument] = value
    try:
        return _FORMS[name](**arguments)
    except ValueError as error:
        raise UserError(f"sampler {text!r}: {error}") from error


def _table(sampler: AbstractSampler, text: str) -> AbstractTableSampler:
    if not isinstance(sampler, AbstractTableSampler):
        raise UserError(f"sampler {text!r}: afs is the first step of a sampler on a grid; accepted are {ACCEPTED}")
    return sampler


def _argument(option: str) -> tuple[str, Any]:
    """The argument that one option sets; its name is empty if the option is malformed."""
    if option.isascii() and option.isdecimal():
        return _COUNT, int(option)
    if option in _WORDS:
        return _WORDS[option]
    name, _, number = option.partition("=")
    try:
        return (name if name in ("lam", "rtol", "atol", "data_std") else ""), float(number)
    except ValueError:
        return "", None


def sampler_name(sampler: AbstractSampler) -> str:
    """The word that `parse_sampler` reads as this sampler, without defaults but the order; the `repr` of one that has none."""
    if isinstance(sampler, OnGrid):
        return f"{sampler_name(sampler.sampler)}@{sampler.grid}"
    if isinstance(sampler, LearnedTable):
        return f"{TABLE}{sampler.file}"
    if isinstance(sampler, AnalyticStart) and sampler.data_std is None:
        return f"afs:{sampler_name(sampler.sampler)}"
    name = next((name for name, form in _FORMS.items() if isinstance(sampler, form)), None)
    if name is None or isinstance(getattr(sampler, "data_std", None), tuple):
        return repr(sampler)
    words = [name]
    for field in dataclasses.fields(sampler):
        value = getattr(sampler, field.name)
        if field.name in _COUNTS:
            words.append(str(value))
        elif value != field.default:
            word = next((word for word, setting in _WORDS.items() if setting == (field.name, value)), None)
            words.append(word or f"{field.name}={str(value).removesuffix('.0')}")
    return ":".join(words)


def steps_for(sampler: AbstractSampler, nfe: int, last: Last = "none") -> int:
    """The most steps that make at most `nfe` network calls, the last one included; 1 if the sampler chooses its own.

    What is left over (Heun with an odd number of calls) is not spent; rows of a table tell the calls made. Raises
    `UserError` if one step makes too many.
    """
    if sampler.nfe(1) is None:
        return 1
    least = count_calls(sampler, 1, last)
    if nfe < least:
        raise UserError(f"nfe: {nfe} given, but {sampler_name(sampler)} with last={last} makes at least {least} calls")
    if (most := count_calls(sampler, nfe + 1, last)) < nfe:
        raise UserError(f"nfe: {nfe} given, but {sampler_name(sampler)} with last={last} makes {most} calls, no more")
    return max(steps for steps in range(1, nfe + 2) if count_calls(sampler, steps, last) <= nfe)


# by word, how many numbers may follow
_GRIDS = {"band": 2, "karras": 1, "log-snr": 0, "power": 1, "tuned": 0, "two-phase": 3, "uniform": 0}
_SCALED = {"band", "tuned"}
GRIDS = (
    "tuned[:data_std=…], power[:POWER], band[:LO:HI][:data_std=…], karras[:RHO], log-snr, "
    "two-phase[:SHARE:FRACTION:POWER], uniform; for example tuned or power:7"
)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How times are laid out, whatever the process and the number of steps: a grid of `gddim.samplers` by its word.

    >>> grid = parse_grid("power:7")
    >>> bool(np.all(grid(gddim.VP(), 1.0, 1e-3, 5) == gddim.power_grid(1.0, 1e-3, 5, power=7))), str(grid)
    (True, 'power:7')
    """

    name: str = "power"
    numbers: tuple[float, ...] = ()
    data_std: float | None = None
    """The unit of band and tuned; None where it is not told."""

    def __call__(
        self, sde: AbstractLinearSDE, t_max: float, t_min: float, steps: int, data_std: float = DATA_STD
    ) -> Float[np.ndarray, " n"]:
        """The times, `(steps + 1,)`, for data of a scale, or its own. Raises `ValueError` like the grid of that name."""
        data_std = data_std if self.data_std is None else self.data_std
        rms = min(data_std, DATA_STD)
        match self.name:
            case "band":
                return band_grid(sde, t_max, t_min, steps, data_std, *self.numbers, rms=rms)
            case "karras":
                return karras_grid(sde, t_max, t_min, steps, *self.numbers)
            case "log-snr":
                return log_snr_grid(sde, t_max, t_min, steps)
            case "two-phase":
                return two_phase_grid(t_max, t_min, steps, *self.numbers)
            case "tuned":
                return tuned_grid(sde, t_max, t_min, steps, data_std, rms)
            case "uniform":
                return uniform_grid(t_max, t_min, steps)
            case _:
                return power_grid(t_max, t_min, steps, *self.numbers)

    def for_data(self, shape: tuple[int, ...]) -> "Grid":
        """This grid for data of a shape: with their `data_scale` where it leaves its unit open."""
        return scaled(self, shape) if self.name in _SCALED else self

    def __str__(self) -> str:
        unit = [] if self.data_std is None else [f"{UNIT}{self.data_std:.12g}"]
        return ":".join([self.name, *(f"{number:.12g}" for number in self.numbers), *unit])


def parse_grid(text: str) -> Grid:
    """The grid that a word such as `band` or `power:7` names. Raises `UserError` that lists what is accepted."""
    name, *numbers = text.strip().lower().split(":")
    if name not in _GRIDS:
        raise UserError(f"unknown grid {text!r}; accepted are {GRIDS}")
    told = numbers and name in _SCALED and numbers[-1].startswith(UNIT)
    try:
        unit = float(numbers.pop().removeprefix(UNIT)) if told else None
        grid = Grid(name, tuple(float(number) for number in numbers), unit)
        if len(numbers) > _GRIDS[name]:
            raise ValueError(f"{name} takes {_GRIDS[name] or 'no'} number{'s' * (_GRIDS[name] != 1)}")
        grid(VP(), 1.0, 1e-3, 8)  # what is wrong with the numbers
    except ValueError as error:
        raise UserError(f"grid {text!r}: {error}; accepted are {GRIDS}") from error
    return grid


class OnGrid(AbstractSampler):
    """A sampler that brings its grid: whatever times it is given, it lays out as many between their ends by its own.

    `sampler`: any that makes the steps that it is told to.
    `grid`: a `Grid`, in units of its own `data_std`, else of the sampler's, or of 0.5 where neither was told any.

    >>> sampler = OnGrid(GDDIM(3, corrector="free", interpolate="data"), Grid("tuned"))
    >>> sampler == parse_sampler("gddim:3:data:free@tuned")
    True
    """

    sampler: AbstractSampler = eqx.field(static=True)
    grid: Grid = eqx.field(static=True)

    def nfe(self, steps: int) -> int | None:
        return self.sampler.nfe(steps)

    @property
    def told_unit(self) -> Any:
        return self.sampler.told_unit if self.grid.data_std is None else self.grid.data_std

    def times(self, sde: AbstractLinearSDE, ts: Any) -> Float[np.ndarray, " n"]:
        """As many as `ts`, between the same ends. Raises `ValueError` like `check_grid` and the grid of that name."""
        ts, std = check_grid(sde, ts, data=True), np.ravel(self.noise_unit)[0]
        return self.grid(sde, ts[0], ts[-1], len(ts) - 1, std)

    def solver(self, sde: AbstractLinearSDE, ts: Any, last: Last = "none") -> AbstractSolver:
        return self.sampler.solver(sde, self.times(sde, ts), last)

    def for_data(self, shape: tuple[int, ...]) -> "OnGrid":
        sampler = self.sampler.for_data(shape)
        return OnGrid(sampler, self.grid if sampler.told_unit is not None else self.grid.for_data(shape))


BEST = OnGrid(GDDIM(3, corrector="free", interpolate="data"), Grid("tuned"))
"""What an experiment samples with unless it is told. Its scale is that of the data's shape (`data_scale`).

On Gaussian mixtures that were not tuned on its median error at 5 6 8 10 15 20 calls through VP is .33 .23 .20 .19 .17 .23 of
that of `gddim:3:data` on power 2, where the best peer has .49 .30 .30 .32 .38 .30; through CLD .29 .27 .25 .21 .19 .22. On the
digits, at 3 4 5 6 8 10 calls, its Fréchet distance is 1.49 1.22 1.19 1.10 .96 .94 through CLD and 1.10 .99 1.00 .94 .92 .90
through VP (means of three sampling seeds; of `gddim:3:data` on power 2 9.32 2.16 1.56 1.30 1.08 1.02 and 1.47 1.07 .95 .92 .89
.88, of one).

Through cifar10_tiny at 4 to 10 calls it is nearer the network's flow than every peer that was measured, through VP and CLD.
FID of 5,000 samples through VP at 4 5 6 8 10 calls is 73.3 72.1 68.4 70.4 71.3, where `gddim:3:data` on power 2 has 77.8 70.5
70.3 71.3 71.5 (1,000 KID at 5 54.4 and 57.4); through CLD at 5 and 10 95.1 73.9, where that has 116.7 74.9. See
experiments/results/solvers.md and cifar10.md."""


def laid_out(sampler: AbstractSampler, grid: Grid | None, power: float | None) -> AbstractSampler:
    """The sampler on a grid that is told, unless it brings its own, or chooses its steps; that of `BEST` gives way."""
    if sampler == BEST and (grid or power):
        sampler = BEST.sampler
    if grid is None or isinstance(sampler, OnGrid | LearnedTable) or sampler.nfe(1) is None:
        return sampler
    return OnGrid(sampler, grid)
