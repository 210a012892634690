"""`python -m experiments` lists the experiments, each with its line."""

import ast
from pathlib import Path

from gddim.errors import printable


def main() -> None:
    printable()
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("[!_]*.py"), *folder.glob("*/__main__.py")]):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            name = path.stem if path.parent == folder else path.parent.name
            line = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
            print(f"python -m experiments.{name:<21} {line.split(']: ')[-1]}")


if __name__ == "__main__":
    main()
