"""What a number was computed with."""

import contextlib
import dataclasses
import functools
import hashlib
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

import gddim

_PACKAGES = ("jax", "jaxlib", "equinox", "numpy", "scipy", "diffrax")


@functools.cache
def software() -> dict[str, Any]:
    """Versions of Python, of this package and of those whose rounding it inherits, and the commit of a checkout."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # of an extra, which nothing here was computed with
            versions[name] = version(name)
    return {
        "versions": {"python": platform.python_version(), "gddim": gddim.__version__, **versions},
        "commit": _commit(),
    }


def stable_repr(value: Any) -> str:
    """An object with all its static parameters, defaults included and functions by name: the same in every process."""
    if type(value) in (tuple, list):
        inner = ", ".join(map(stable_repr, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, functools.partial):
        return f"partial({', '.join(map(stable_repr, (value.func, *value.args, *sorted(value.keywords.items()))))})"
    if callable(value) and not dataclasses.is_dataclass(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = (
        f"{field.name}={stable_repr(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if field.init and field.repr
    )
    return f"{type(value).__name__}({', '.join(fields)})"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a description by their dotted names."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, item in value.items():
        yield from flatten(item, f"{prefix}.{name}" if prefix else name)


def hardware() -> str:
    """Number and kind of the devices."""
    devices = jax.devices()
    return f"{len(devices)} × {devices[0].device_kind}"


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with a digest of what differs from it; None outside of one."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("rev-parse", "--show-toplevel") or Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        changed = git("diff", "HEAD")
        return git("rev-parse", "HEAD") + (
            f"-modified-{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else ""
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
