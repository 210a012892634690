"""What a command line shows of itself: the options that its verb needs, and their completion in a shell."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gddim.experiment.options import is_flag, tyro

T = TypeVar("T")

_BOTH = {"verb", "workdir", "dry_run", "data", "mesh", "compiled"}
_AFTERWARDS = _BOTH | {"step", "sampling"}
NEEDED = {
    "train": _BOTH | {"peak_flops", "seed", "sde", "net", "model", "train"},
    "sample": _AFTERWARDS | {"from_", "strength"},
    "evaluate": _AFTERWARDS | {"eval"},
    "likelihood": _AFTERWARDS | {"eval"},
    "encode": _AFTERWARDS | {"from_"},
    "restore": _AFTERWARDS | {"restore"},
    "fit": _AFTERWARDS | {"fit"},
}
"""Fields of a command and its experiment, by verb; every verb takes all others, too."""

COMPLETION = "--completion"


def needed(command: T, verb: str) -> T:
    """A command that a help tells only of what its verb needs, and of each part in a sentence."""
    names = NEEDED.get(verb)
    experiment = _telling(command.experiment, names, {})  # pyright: ignore[reportAttributeAccessIssue]
    kind = Annotated[type(experiment), tyro.conf.arg(name="")]
    shown = dataclasses.replace(command, verb=verb, experiment=experiment)  # pyright: ignore[reportArgumentType]
    return _telling(shown, names, {"experiment": kind})


def _telling(value: T, names: Collection[str] | None, kinds: dict[str, Any]) -> T:
    """A dataclass of which only these fields, or all, and those of these kinds are told."""
    cls = type(value)
    told: dict[str, Any] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        part = getattr(value, name)
        if names is not None and name not in names:
            hint = tyro.conf.Suppress[hint]
        elif dataclasses.is_dataclass(part):
            about = (inspect.getdoc(type(part)) or "").partition("\n\n")[0]
            hint = Annotated[hint, tyro.conf.arg(help=f"{type(part).__name__}: {about}")]
        told[name] = hint
    unchecked = {"__post_init__": lambda self: None}  # it was checked when it was made
    made = type(cls.__name__, (cls,), {"__annotations__": told | kinds, "__module__": cls.__module__, **unchecked})
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # pyright: ignore[reportArgumentType]
    return dataclasses.dataclass(frozen=True, kw_only=True)(made)(**fields)  # pyright: ignore[reportReturnType]


def completion(program: str, verbs: Collection[str], options: Mapping[str, Any]) -> str:
    """A script that has bash complete a module or a file: verbs, options, and the words that an option takes, or files."""
    valued = {name: " ".join(map(str, _words(kind))) for name, kind in options.items() if not is_flag(kind)}
    cases = [f'{name}) words="{words}" ;;' for name, words in valued.items() if words]
    files = "|".join(name for name, words in valued.items() if not words)
    return _SCRIPT.format(
        program=program,
        name=re.sub(r"[^a-zA-Z0-9]", "_", program),
        cases="\n        ".join([*cases, f"{files}) return ;;"]),
        words=" ".join([*verbs, *options, "--help"]),
    )


def _words(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        return _words(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) is Literal else ()


_SCRIPT = """\
_complete_{name}() {{
    local words="{words}"
    case $2 in
        {cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$1"))
}}
_complete_module() {{
    local i name
    for ((i = 1; i < COMP_CWORD; i++)); do
        name=_complete_${{COMP_WORDS[i]//[^a-zA-Z0-9]/_}}
        declare -F "$name" >/dev/null && "$name" "$2" "$3" && return
    done
}}
complete -o default -F _complete_module python python3 run  # of {program}
"""
