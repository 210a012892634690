"""The rules of the house, read off the source: who imports whom, and what nobody does."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gddim", "experiments", "infra", "tests")
TREES = {path: ast.parse(path.read_text()) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
PACKAGE = [path for path in TREES if path.is_relative_to(ROOT / "gddim")]

# What each part of gddim imports of the other parts, from the ground up; all may import `errors`.
IMPORTS = {
    **{
        ground: set()
        for ground in (
            "averages",
            "conjugate_gradients",
            "errors",
            "logs",
            "parallel",
            "pickles",
            "safetensors",
            "sde",
            "settings",
            "storage",
        )
    },
    "checksums": {"parallel"},
    "checkpoint": {"parallel", "storage", "checksums"},
    "data": {"parallel", "settings", "storage"},
    "denoiser": {"sde"},
    "loss": {"sde"},
    "model": {"sde", "denoiser"},
    "guidance": {"sde", "denoiser", "conjugate_gradients"},
    "measurements": {"sde"},
    "nn": {"settings"},
    "samplers": {"sde"},
    "torch_reader": {"pickles", "storage"},
    "train": {"averages", "logs"},
    "compact": {"safetensors", "storage"},
    "weights": {"compact", "safetensors", "storage"},
    "laws": {"sde"},
    "check": {"sde", "samplers", "laws", "parallel"},
    "evaluation": {"sde", "samplers", "model", "guidance", "data", "parallel", "storage", "logs", "torch_reader"},
    "experiment": {
        *(
            "sde",
            "samplers",
            "model",
            "guidance",
            "denoiser",
            "measurements",
            "loss",
            "train",
            "data",
            "parallel",
            "checkpoint",
            "storage",
            "settings",
            "logs",
        ),
        *("evaluation", "averages", "compact", "checksums", "nn", "weights"),
    },
    "loading": {"sde", "samplers", "denoiser", "model", "guidance", "parallel", "experiment"},
    "export": {
        *(
            "checkpoint",
            "compact",
            "parallel",
            "samplers",
            "sde",
            "storage",
            "weights",
            "evaluation",
            "experiment",
            "loading",
        )
    },
    "generate": {"data", "evaluation", "experiment", "guidance", "loading", "parallel", "samplers", "sde", "storage"},
    "convert": {  # it writes a run
        *(
            "nn",
            "sde",
            "samplers",
            "parallel",
            "storage",
            "train",
            "pickles",
            "safetensors",
            "torch_reader",
            "data",
            "experiment",
        )
    },
}
READ_THE_COMMAND_LINE = {"experiment", "check", "convert", "export", "generate", "__main__"}
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def at(path: Path, node: ast.AST | None = None) -> str:
    return str(path.relative_to(ROOT)) + (f":{node.lineno}" if node else "")  # pyright: ignore[reportAttributeAccessIssue]


def part(path: Path) -> str:
    """The module or subpackage directly below gddim that a file belongs to."""
    return path.relative_to(ROOT / "gddim").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The full name of everything that a file imports, also inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = [*package[: len(package) + 1 - node.level]] if node.level else []
            yield from (".".join([*above, node.module or "", alias.name]).replace("..", ".") for alias in node.names)


def tops(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)}


def parts_imported(path: Path) -> set[str]:
    """The other parts of gddim that a file imports; a name that gddim re-exports counts as the part that defines it."""
    exports = [name.split(".") for name in imports(ROOT / "gddim" / "__init__.py") if name.startswith("gddim.")]
    defined_in = {name[-1]: name[1] for name in exports}
    own = [name.split(".") for name in imports(path) if name.startswith("gddim.")]
    return {defined_in.get(name[1], name[1]) for name in own} - {part(path)}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_imports_are_those_that_are_stated_and_no_others():
    found: dict[str, set[str]] = {}
    for path in PACKAGE:
        if part(path) != "__init__":  # it exports what all others define
            found.setdefault(part(path), set()).update(parts_imported(path) - {"errors"})
    assert found == IMPORTS


def test_nothing_in_the_package_imports_what_is_built_on_it():
    assert not [f"{at(path)}: {t}" for path in PACKAGE for t in tops(path) & {"experiments", "infra", "tests"}]


def test_the_order_of_imports_has_no_circle():
    left = set(IMPORTS)
    while lowest := {p for p in left if not IMPORTS[p] & left}:
        left -= lowest
    assert not left


def test_only_the_command_line_reads_the_command_line():
    wrong = []
    for path in PACKAGE:
        if {part(path), path.stem} & READ_THE_COMMAND_LINE:
            continue
        wrong += [f"{at(path)} imports {t}" for t in tops(path) & {"argparse", "tyro"}]
        attributes = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)]
        wrong += [at(path, node) for node in attributes if ast.unparse(node) == "sys.argv"]
    assert not wrong


def test_only_parallel_makes_meshes():
    makers = {"Mesh", "jax.make_mesh", "jax.sharding.Mesh", "sharding.Mesh"}
    parallel = {path for path in PACKAGE if part(path) == "parallel"}
    others = [path for path in TREES if path.parent.name != "tests" and path not in parallel]
    assert not [at(path, call) for path in others for function, call in calls(path) if function in makers]
    assert not [at(path) for path in others for module in imports(path) if "mesh_utils" in module]


def test_nothing_turns_x64_on_globally():
    wrong = []
    for path, tree in TREES.items():
        scoped = {id(item.context_expr) for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items}
        for function, call in calls(path):
            update = function.endswith("config.update") and "x64" in ast.unparse(call)
            if update or (function.endswith("enable_x64") and id(call) not in scoped):
                wrong.append(at(path, call))
    assert not wrong


def test_no_pickle_and_no_eval():
    shipped = [path for path in TREES if path.parent.name != "tests"]
    wrong = [f"{at(path)} imports {t}" for path in shipped for t in tops(path) & PICKLES]
    for path in shipped:
        for function, call in calls(path):
            allowed = [k for k in call.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            if function in {"eval", "exec"} or allowed:
                wrong.append(at(path, call))
    assert not wrong


def test_no_method_is_overridden_and_nobody_asks_which_process():
    processes = {"VP", "CLD", "Blurring", "LinearSDE", "GaussianPath", "VE", "SubVP", "FlowMatching"}
    wrong = []
    for path in PACKAGE:
        for function, call in calls(path):
            names = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
            if function == "super" or (function == "isinstance" and names & processes):
                wrong.append(at(path, call))
    assert not wrong


def test_files_are_short():
    files = [*TREES, *(path for path in (ROOT / "infra").rglob("*") if path.is_file() and path.suffix != ".pyc")]
    assert not [at(path) for path in files if len(path.read_text().splitlines()) > 350]


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import gddim

heavy = {"diffrax", "grain", "matplotlib", "orbax", "PIL", "sklearn", "tensorboardX", "tyro"} & set(sys.modules)
assert not heavy, f"import gddim loads {heavy}"
for module in pkgutil.walk_packages(gddim.__path__, "gddim."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import jax
from jax._src import xla_bridge

assert not xla_bridge.backends_are_initialized(), "importing touched a device"
assert not jax.config.jax_enable_x64 and jax.config.jax_numpy_dtype_promotion == "standard", "importing set a flag"
"""


def test_importing_touches_no_device_sets_no_flag_and_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING], capture_output=True, text=True, cwd=ROOT)
    assert not done.stdout + done.stderr


def test_import_is_quick():
    def seconds() -> float:
        """Of processor time, which on an idle machine is what it takes, whatever else runs on this one."""
        before = os.times()
        subprocess.run([sys.executable, "-c", "import gddim"], check=True, cwd=ROOT)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 2
