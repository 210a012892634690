"""Samplers and processes as values of options: each is a word."""

from typing import Annotated

from gddim.errors import UserError
from gddim.experiment.options import one_word
from gddim.samplers import AbstractSampler
from gddim.samplers.words import Grid, parse_grid, parse_sampler, sampler_name
from gddim.sde import AbstractLinearSDE
from gddim.sde.words import parse_process, process_name

Sampler = Annotated[AbstractSampler, one_word("SAMPLER", parse_sampler, AbstractSampler, sampler_name)]
TimeGrid = Annotated[Grid | None, one_word("GRID", parse_grid, Grid | None)]
OWN = "own"  # the word of the process that a run was trained with


def process_or_own(word: str) -> AbstractLinearSDE | None:
    """The process of a word, None being the run's own. Raises `UserError` for one that is none."""
    try:
        return None if word == OWN else parse_process(word)
    except UserError as error:
        raise UserError(f"{error}; {OWN} is the one that the run was trained with") from error


def spell_process(sde: AbstractLinearSDE | None) -> str:
    """The word of a process to draw through, None being the run's own."""
    return OWN if sde is None else process_name(sde)


Process = Annotated[
    AbstractLinearSDE | None, one_word("PROCESS", process_or_own, AbstractLinearSDE | None, spell_process)
]
