"""The options of a command line, by the types of its dataclasses, and what is wrong with words that tyro refuses."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from gddim.errors import UserError
from gddim.sde import AbstractLinearSDE

if TYPE_CHECKING:
    import tyro
else:
    try:
        import tyro
    except ImportError:
        from gddim.experiment import marks as tyro

UNGROUPED = "ungrouped"
"""Key in the metadata of a field whose options, and entry in a configuration, stand in no group of their own."""

SPELLED = "spelled"
"""Key in the metadata of a field that a configuration has as a word: the function that spells it."""

REGISTRY = tyro.constructors.ConstructorRegistry()


def one_word(
    metavar: str, parse: Callable[[str], Any], accepted: Any, spell: Callable[[Any], str] = str
) -> tyro.constructors.PrimitiveConstructorSpec:
    """How a value of the `accepted` types is one word of a command line."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: isinstance(value, accepted),
        str_from_instance=lambda value: [spell(value)],
    )


@REGISTRY.struct_rule
def _leave_alone(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """A process made of functions has no options: what is not built from its fields stays as the experiment has it."""
    if not (dataclasses.is_dataclass(info.type) and _made_of_functions(info.default)):
        return None
    return tyro.constructors.StructConstructorSpec(lambda: info.default, fields=())


def _made_of_functions(value: Any) -> bool:
    if not isinstance(value, AbstractLinearSDE):
        return False
    fields = {field.name for field in dataclasses.fields(value)}  # pyright: ignore[reportArgumentType]
    return not fields >= set(inspect.signature(type(value)).parameters)


def options(value: Any, group: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of every option that a dataclass makes, `--group.field`; those without a value are of type bool."""
    hints = get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(value):
        kind, default = hints[field.name], getattr(value, field.name)
        marks = getattr(kind, "__metadata__", ())
        if not field.init or any(mark in (tyro.conf.Suppress, tyro.conf.Positional) for mark in marks):
            continue
        named = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
        name = [field.name.replace("_", "-"), *named][-1]
        alone = field.metadata.get(UNGROUPED) or any(getattr(mark, "prefix_name", None) is False for mark in marks)
        prefix = "" if alone else group
        if dataclasses.is_dataclass(default) and find_spec(kind) is None:
            if not _made_of_functions(default):
                yield from options(default, f"{prefix}{name}." if name else prefix)
            continue
        for each in (f"--{prefix}{name}", *(alias for mark in marks for alias in getattr(mark, "aliases", None) or ())):
            yield each, kind
        if kind is bool:
            yield f"--{prefix}no-{name}", kind


def said(argv: Sequence[str], *names: str) -> dict[str, str]:
    """Those of these options that a command line gives, each with the word after it."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    found = {word.replace("_", "-"): after for word, after in itertools.pairwise([*words, ""])}
    return {name: found[name] for name in names if name in found}


def explain(argv: Sequence[str], known: dict[str, Any], verbs: Sequence[str]) -> None:
    """Raise `UserError` for the first word of a command line that cannot be, as far as the names and types tell."""
    words, verb = deque(argv), None
    while words:
        word = words.popleft()
        if not word.startswith("--"):
            if word not in verbs:
                raise UserError(f"{word!r} is no verb, and no option's value; the verbs are {', '.join(verbs)}")
            if verb:
                raise UserError(f"one verb at a time, not both {verb} and {word}")
            verb = word
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in known:
            _refuse(name, list(known))
        kind = known[name]
        if is_flag(kind):
            if equals:
                raise UserError(f"{word}: {name} takes no value")
            continue
        given = [value] if equals else []
        while words and not words[0].startswith("--") and (_many(kind) or not given):
            given.append(words.popleft())
        if not given and not _many(kind):
            raise UserError(f"{name} needs a value{': ' * bool(what := _accepted(kind))}{what}")
        for each in given:
            _check(name, each, kind, given, verbs)


def _check(name: str, word: str, kind: Any, given: list[str], verbs: Sequence[str]) -> None:
    """Raise `UserError` for a word that an option does not take."""
    fault = _fault(kind, word)
    if fault is None:
        return
    if _many(kind) and word in verbs:
        raise UserError(f"the verb comes first: {' '.join([word, name, *(each for each in given if each != word)])}")
    parts = " ".join(given).replace(",", " ").split()
    if _many(kind) and "," in word and parts and not any(_fault(kind, part) for part in parts):
        raise UserError(f"{name} {' '.join(given)}: separate by spaces: {' '.join([name, *parts])}")
    raise UserError(f"{name} {word}: {fault}")


def _refuse(name: str, known: list[str]) -> NoReturn:
    """Raise `UserError` for an unknown option: it tells those of this very name in another group, or else the nearest
    ones, and the others of its group."""
    group, _, leaf = name.removeprefix("--").rpartition(".")

    split = {option: option.removeprefix("--").rpartition(".") for option in known}
    elsewhere = [option for option, (_, _, word) in split.items() if word == leaf]

    def likeness(option: str) -> tuple[bool, bool, float]:
        theirs, _, word = split[option]
        initials = "".join(part[0] for part in word.split("-"))
        same = len(leaf) > 1 and leaf == initials  # --train.lr
        return same, same and group == theirs, difflib.SequenceMatcher(None, name, option).ratio()

    ranked = sorted(known, key=likeness, reverse=True)
    near = [option for option in ranked if likeness(option)[0] or likeness(option)[2] >= 0.6][:3]
    others = [option for option in known if split[option][0] == group]
    accepted = elsewhere or dict.fromkeys(near + others)
    raise UserError(f"unknown option {name}; accepted: {', '.join(accepted)}; see --help")


def _fault(kind: Any, word: str) -> str | None:
    """What is wrong with a word for a value of this type, or for one of several; None where nothing is."""
    if spec := find_spec(kind):
        try:
            spec.instance_from_str([word])
        except (ValueError, TypeError) as error:
            return str(error)
        return None
    inner = [each for each in get_args(kind) if each is not Ellipsis]
    match get_origin(kind):
        case origin if origin is Annotated or _many(kind):
            return _fault(inner[0], word)
        case origin if origin in (Union, UnionType):
            fits = any(_fault(each, word) is None for each in inner)
        case origin if origin is Literal:
            fits = word in map(str, inner)
        case _ if kind is NoneType:
            fits = word == "None"
        case _ if kind in (int, float):
            fits = _reads(kind, word)
        case _:
            fits = True
    return None if fits else f"accepted is {_accepted(kind)}"


def _accepted(kind: Any) -> str:
    """In words, the values of a type; nothing for any text."""
    if spec := find_spec(kind):
        return spec.metavar
    inner = [each for each in get_args(kind) if each is not Ellipsis]
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(filter(None, map(_accepted, inner)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if inner:
        return _accepted(inner[0])
    return {int: "a whole number", float: "a number", NoneType: "None"}.get(kind, "")


def _reads(kind: type, word: str) -> bool:
    try:
        kind(word)
    except ValueError:
        return False
    return True


def _many(kind: Any) -> bool:
    """Whether an option takes several words."""
    if get_origin(kind) is Annotated:
        return find_spec(kind) is None and _many(get_args(kind)[0])
    return get_origin(kind) in (tuple, list, set, frozenset, Sequence)


def is_flag(kind: Any) -> bool:
    """Whether an option of this type takes no value."""
    return kind is bool or (get_origin(kind) is Annotated and get_args(kind)[0] is bool)


def find_spec(kind: Any) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """How a value of this type is one word, where it is."""
    marks = getattr(kind, "__metadata__", ())
    return next((mark for mark in marks if isinstance(mark, tyro.constructors.PrimitiveConstructorSpec)), None)
