"""A pickle as data: its opcodes are interpreted one by one, and nothing is imported or run.

Only opcodes that build numbers, strings and containers are known, and calls are those of a table of ours, by the name that
the file gives. Anything else in the file is an error, not an instruction.
"""

import pickletools
from collections.abc import Callable, Mapping
from sys import getsizeof
from typing import Any, NamedTuple, Protocol, runtime_checkable

from gddim.errors import UserError

Calls = Mapping[str, Callable[..., Any]]
ALLOWED, OPCODE = 2**25, 100  # bytes: that any pickle may make, and that an opcode, often of one byte, makes at most
_MARK = object()
_PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_CONSTANTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


@runtime_checkable
class Readable(Protocol):
    """Bytes with a position; those that `read` gives as a memoryview are not copied."""

    def read(self, count: int, /) -> bytes | memoryview: ...

    def readline(self) -> bytes: ...


class Name(NamedTuple):
    """A class or function that the file names, `module name`; never imported."""

    name: str


class Thing:
    """An object of a class that is only named, with the state that the file gives it."""

    def __init__(self, name: str, state: Any = None):
        self.name, self.state = name, state


def unpickle(file: Readable, calls: Calls, size: int, persistent: Callable[..., Any] | None = None) -> Any:
    """The value of one pickle, made of containers, numbers, strings, `Name`s, and what `calls` return.

    `calls`: by `module name`, what a call of that function, or a new object of that class, is to us.
    `size`: of the whole file, in bytes; a pickle that makes much more of it than that is refused.
    `persistent`: what the file refers to by an identifier.

    Raises `UserError` for what is not known here, and whatever bytes that are no pickle lead to.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    left = ALLOWED + 2 * size  # bytes: as much for texts and numbers, and for what calls take, as the file has
    argument: Any
    for opcode, argument, position in pickletools.genops(file):  # pyright: ignore[reportArgumentType]
        name: str = opcode.name
        left -= OPCODE + getsizeof(argument)
        if left < 0:
            raise UserError(f"its pickle makes too many objects for a file of {size:,} bytes")
        if name in _CONSTANTS:
            stack.append(argument)
            continue
        match name:
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_PUSHED[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append(_EMPTY[name]())
                left -= getsizeof(stack[-1])
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(_since_mark(stack)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise UserError("its pickle takes more than it has put down")
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = _since_mark(stack) if name == "APPENDS" else [stack.pop()]
                _of(stack[-1], list).extend(items)
            case "ADDITEMS":
                items = _since_mark(stack)
                _of(stack[-1], set).update(map(_key, items))
            case "SETITEM" | "SETITEMS":
                items = _since_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _of(stack[-1], dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "GLOBAL":
                stack.append(Name(argument))
            case "STACK_GLOBAL":
                attribute, module = _of(stack.pop(), str), _of(stack.pop(), str)
                stack.append(Name(f"{module} {attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = _of(stack.pop(), tuple), stack.pop()
                left -= sum(map(_held, arguments))  # of which a call may make a copy, as often as it is called
                stack.append(_call(calls, function, arguments))
            case "BINPERSID" if persistent is not None:
                stack.append(persistent(*_of(stack.pop(), tuple)))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Thing):
                    stack[-1].state = state
                # else attributes of a dictionary, as the version numbers of its modules, or of a type of numbers
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case other:
                raise UserError(f"opcode {other} at byte {position} is not one that a checkpoint needs")
    raise UserError("the pickle has no end")


def _held(value: Any) -> int:
    """Bytes of an argument, those of a file's own that it is a view of included."""
    return value.nbytes if isinstance(value, memoryview) else getsizeof(value)


def _since_mark(stack: list[Any]) -> list[Any]:
    start = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is _MARK)
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _call(calls: Calls, function: Any, arguments: tuple) -> Any:
    if not isinstance(function, Name) or function.name not in calls:
        named = function.name if isinstance(function, Name) else "something without a name"
        raise UserError(f"it calls {named:.100}, which no checkpoint needs")
    return calls[function.name](*arguments)


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise UserError(f"its pickle has a {type(value).__name__} where a {kind.__name__} must be")
    return value


def _key(value: Any) -> str | int:
    """A key of a dictionary; one of nested tuples would overflow the interpreter's own stack."""
    if not isinstance(value, str | int):
        raise UserError(f"its pickle has a {type(value).__name__} as a key")
    return value
