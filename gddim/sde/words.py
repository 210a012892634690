"""Processes by name, as a command line and a table spell them."""

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

from gddim.errors import UserError
from gddim.sde.base import AbstractLinearSDE
from gddim.sde.cld import CLD
from gddim.sde.langevin import PSLD, CriticallyDamped
from gddim.sde.path import VE, CosineVP, FlowMatching
from gddim.sde.vp import VP, SubVP

_FORMS: dict[str, Callable[..., AbstractLinearSDE]] = {
    "vp": VP, "cosine": CosineVP, "subvp": SubVP, "ve": VE, "flow": FlowMatching,
    "cld": CLD, "psld": PSLD, "langevin": CriticallyDamped,
}  # fmt: skip
ACCEPTED = (
    f"{', '.join(_FORMS)}, and module:object, each with its parameters; for example cld:gamma=0.1 or langevin:order=4"
)
_made: dict[str, AbstractLinearSDE] = {}  # by word: one solution and one compiled program each, and the way back to it


def parse_process(text: str) -> AbstractLinearSDE:
    """The process that a word names: `vp`, `cld:gamma=0.1`, or `module:object[:NAME=NUMBER]` for one's own.

    The object is a process, or a function that makes one, for which the numbers are. Raises `UserError` that lists what
    is accepted.
    """
    head, *options = text.strip().split(":")
    name = head.lower()
    if name in _FORMS:
        form: Any = _FORMS[name]
    elif options:
        name, form = f"{head}:{options[0]}", _imported(head, options[0])
        name, options = next((word for word, known in _FORMS.items() if known is form), name), options[1:]
    else:
        raise UserError(f"unknown process {text!r}; accepted are {ACCEPTED}")
    arguments = _arguments(text, form, options)
    word = _spelled(name, form, arguments)
    if word not in _made:
        _made[word] = _call(text, form, arguments)
    return _made[word]


def is_named(word: str) -> bool:
    """Whether a word begins with a name of this package's, so that reading it imports nothing."""
    return word.split(":")[0].lower() in _FORMS


def process_name(sde: AbstractLinearSDE) -> str:
    """The shortest word that `parse_process` reads as this process; the `repr`, in a line, of one that has no word."""
    for name, form in _FORMS.items():
        if type(sde) is form:
            return _spelled(name, form, {each: getattr(sde, each) for each in inspect.signature(form).parameters})
    for word, made in _made.items():
        if made == sde:
            return word
    functions = ((name, form) for name, form in _FORMS.items() if not isinstance(form, type))
    return next((name for name, form in functions if form() is sde), " ".join(repr(sde).split()))


def _imported(module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"process {module}:{attribute}: {error}; accepted are {ACCEPTED}") from error


def _call(text: str, form: Any, arguments: dict[str, float | int]) -> AbstractLinearSDE:
    """The process of a form. Raises `UserError` for one that wants more than numbers, refuses these, or makes another thing."""
    try:
        if callable(form):
            inspect.signature(form).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"process {text} cannot be called without arguments: {error}; name a process itself") from error
    try:
        found = form(**arguments) if callable(form) else form
    except ValueError as error:
        raise UserError(f"process {text}: {error}") from error
    if not isinstance(found, AbstractLinearSDE):
        raise UserError(f"process {text} is a {type(found).__name__}, not a gddim.AbstractLinearSDE")
    return found


def _arguments(text: str, form: Any, options: list[str]) -> dict[str, float | int]:
    """The numbers that options give. Raises `UserError` for one that is none, and a name that the form does not have."""
    known = inspect.signature(form).parameters if callable(form) else {}
    found: dict[str, float | int] = {}
    for option in options:
        name, _, number = option.partition("=")
        kind = int if name in known and isinstance(known[name].default, int) else float
        value = _number(number, kind)
        if name not in known or name in found or value is None:
            what = "whole" if kind is int else "finite"
            why = "is set twice" if name in found else f"is no parameter set to a {what} number"
            takes = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
            raise UserError(f"process {text}: {option!r} {why}; {takes}")
        found[name] = value
    return found


def _number(text: str, kind: type) -> float | int | None:
    try:
        value = kind(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _spelled(name: str, form: Any, arguments: dict[str, float | int]) -> str:
    """The word of a form with these arguments, those left out that are its defaults."""
    known = inspect.signature(form).parameters if callable(form) else {}
    told = (f"{each}={str(arguments[each]).removesuffix('.0')}" for each, parameter in known.items()
            if each in arguments and arguments[each] != parameter.default)  # fmt: skip
    return ":".join([name, *told])
