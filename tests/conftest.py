"""How every test runs: eight fake CPU devices, strict promotion, shapes checked, compiled programs kept."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

# Read by XLA and JAX when they are imported, and inherited by the processes that tests start.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One folder a machine: compiled programs use the instructions of the processor that they were compiled on.
_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gddim" / f"xla-{platform.node()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("gddim", "beartype.beartype")
# Compilation takes what time it takes; the same examples every time, so that a failure is there again tomorrow.
hypothesis.settings.register_profile("gddim", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("gddim")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by measurement, not by what tests are: those of slow.txt take half a second or more, of long.txt more than five.

    Of a test whose every case does the quickest stays, if it takes little over a second.
    """
    slow, long = (
        set(Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8").splitlines())
        for name in ("slow", "long")
    )
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name in long or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.long)
        if name in slow | long:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> Iterator[None]:
    """Each compiled program holds tens of memory mappings: Linux ends a process that asks for more than 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


def _folder(variable: str, default: Path | None, what: str) -> Path:
    path = Path(os.environ[variable]) if os.environ.get(variable) else default
    if path is None or not path.is_dir():
        pytest.skip(f"{what}: set {variable}" if path is None else f"{what}: {path} is no folder ({variable})")
    return path


@pytest.fixture(scope="session")
def gddim_data() -> Path:
    """The folder with cifar-10-batches-bin/ and inception/; skips the test where there is none."""
    return _folder("GDDIM_DATA", None, "needs CIFAR-10 and the Inception network")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The folder of reference files of the published networks; skips the test where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    return _folder("GDDIM_FIXTURES", default, "needs the reference files")
