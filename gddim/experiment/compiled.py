"""Compiled programs, kept from one command to the next."""

import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from gddim.errors import place


def kept_programs() -> str:
    """The folder of this machine: programs use the instructions of the processor that they were compiled on."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.fspath(Path(cache, "gddim", f"xla-{platform.node()}"))


def keep_programs(folder: str) -> None:
    """Have XLA look into a folder first: a program is known by its code, its options, and the versions of JAX and XLA."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(place(folder)))
    compilation_cache.reset_cache()  # it may have looked already, and found that it had no folder
