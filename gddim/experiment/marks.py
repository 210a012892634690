"""In the place of tyro, where it is not installed: the marks of an option, which say nothing to whoever only loads a run."""

import dataclasses
from collections.abc import Callable
from typing import Any


class _Unmarked:
    """`Suppress[kind]` is the kind."""

    def __getitem__(self, kind: Any) -> Any:
        return kind


class conf:
    Suppress = Positional = FlagCreatePairsOff = _Unmarked()

    @staticmethod
    def arg(**options: Any) -> None:
        return None


class constructors:
    StructTypeInfo = StructConstructorSpec = Any

    @dataclasses.dataclass(frozen=True)
    class PrimitiveConstructorSpec:
        """How a value is one word: that is read also without tyro."""

        nargs: int
        metavar: str
        instance_from_str: Callable[[list[str]], Any]
        is_instance: Callable[[Any], bool]
        str_from_instance: Callable[[Any], list[str]]

    class ConstructorRegistry:
        def struct_rule(self, rule: Any) -> Any:
            return rule
