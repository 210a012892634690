"""Several hosts as one: start-up, what all processes agree on, and stopping all of them at the same step."""

import contextlib
import glob
import importlib.util
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.extend
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, ArrayLike, Shaped

from gddim.errors import UserError

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the launchers start a run that ends with it again
EXIT_INTERRUPTED = 130  # no launcher starts it again
EXIT_LOST = 134  # SIGABRT, with which JAX ends a process whose job has lost another: idem
HEARTBEAT_SECONDS = 30  # a process that has been silent for so long is lost, and JAX ends the others
VERDICT_SECONDS = 45  # by then it has

# How each launcher says which process this is, out of how many; the first pair that is set counts.
_RANKS = (
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("JOB_COMPLETION_INDEX", "JAX_NUM_PROCESSES"),
)

_BACKENDS = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}  # by the names in JAX_PLATFORMS


def _number(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdecimal():
        raise UserError(f"{name}={env[name]}: give a whole number")
    return int(env[name])


def cluster(env: Mapping[str, str], on_tpu: bool) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` in this environment; None on a plain machine.

    An address in JAX_COORDINATOR_ADDRESS comes first (with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or the rank that
    Open MPI, SLURM or an indexed Kubernetes job sets); then SLURM and Open MPI jobs of more than one task; then TPU
    machines, on GCE or GKE. An interactive shell inside a SLURM allocation is a plain machine. Open MPI's ranks on one
    node take a GPU each; JAX sees to that only where it finds the variables of Open MPI 4.
    Raises `UserError` for a job of which only a part is given.
    """
    pair = next((pair for pair in _RANKS if all(name in env for name in pair)), None)
    rank: dict[str, Any] = {}
    if pair:
        rank = {"process_id": _number(env, pair[0]), "num_processes": _number(env, pair[1])}
        # A rank that sees one GPU, or was told its own, needs no choice.
        chosen = "JAX_LOCAL_DEVICE_IDS" in env or "," not in env.get("CUDA_VISIBLE_DEVICES", ",")
        if pair[0].startswith("OMPI") and int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1 and not chosen:
            rank["local_device_ids"] = [int(env["OMPI_COMM_WORLD_LOCAL_RANK"])]
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        if not pair:
            raise UserError("JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID as well")
        if rank["process_id"] >= rank["num_processes"]:
            raise UserError(f"{pair[0]}={env[pair[0]]} must be below {pair[1]}={env[pair[1]]}")
        return {"coordinator_address": address, **rank}
    if on_tpu:
        return {}
    if not pair and "JAX_NUM_PROCESSES" in env and _number(env, "JAX_NUM_PROCESSES") > 1:
        raise UserError("JAX_NUM_PROCESSES is set: set JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID as well")
    if rank.get("num_processes", 1) == 1:
        return None
    if "SLURM_STEP_NODELIST" in env or "OMPI_MCA_orte_hnp_uri" in env:
        return dict(rank)
    raise UserError(f"a job of {rank['num_processes']} processes, but no JAX_COORDINATOR_ADDRESS=host:port")


def initialize(batch: int = 1) -> None:
    """Joins this process to its job, if it is in one. Call it before JAX is used.

    A process on its own makes a device of each core that `batch` rows keep busy, unless XLA_FLAGS or JAX has settled their
    number: two cores do more with half a batch each than with a program that they share. Raises `UserError` when JAX does
    not run on what JAX_PLATFORMS names first: JAX itself falls back without a word.
    """
    # libtpu and its device files: what JAX itself takes for a TPU machine, without asking a metadata server.
    on_tpu = bool(
        importlib.util.find_spec("libtpu")
        and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
        and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    )
    job = cluster(os.environ, on_tpu)
    if job is not None and not jax.distributed.is_initialized():
        _join(job)
    if job is None and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has its devices
            jax.config.update("jax_num_cpu_devices", _busy(os.cpu_count() or 1, batch))
    check_backend()


def _busy(cores: int, batch: int) -> int:
    """The most cores that split a batch into equal parts of 16 rows or more."""
    return max(n for n in range(1, cores + 1) if n == 1 or batch % (16 * n) == 0)


def check_backend() -> None:
    """Raise `UserError` unless JAX runs on what JAX_PLATFORMS names first: it falls back without a word, or fails in pages."""
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked:
        return
    first = asked.partition(",")[0]
    extra = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}.get(first)
    how = f"pip install 'gddim[{extra}]', or another" if extra else f"accepted: {', '.join(_BACKENDS)}"
    try:
        there = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split()) or "JAX finds no plugin for it"
        raise UserError(f"JAX_PLATFORMS={asked}: {why}; {how}") from error
    if _BACKENDS.get(first, there) != there:
        raise UserError(
            f"JAX_PLATFORMS={asked} asks for {first} first, but JAX finds no working one, only {there}; {how}"
        )


def _join(job: dict[str, Any]) -> None:
    """Joins the job that `cluster` found.

    An exception that nobody catches then ends this process without waiting for the others, so that they learn of it.
    """
    jax.extend.backend.clear_backends()  # a process written in JAX was evaluated when its experiment was imported
    jax.distributed.initialize(**job, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    report = sys.excepthook

    def end(kind, error, trace) -> None:
        report(kind, error, trace)
        if threading.current_thread() is not threading.main_thread():
            return  # tensorstore's threads report harmless errors here
        await_verdict()
        leave(1)

    sys.excepthook = end


def await_verdict() -> None:
    """Call it for an error before this process ends with status 1: does not return where another process was lost.

    A lost process shows itself first as any error: a collective that fails (`JaxRuntimeError` or `ValueError`, by its
    backend), the barrier of a save that times out (`OSError`). JAX learns of it later, and then ends this one with
    EXIT_LOST, on which launchers start the job again.
    """
    if jax.distributed.is_initialized():
        verdict = f"JAX tells within {VERDICT_SECONDS} s and ends this one with status {EXIT_LOST}"
        print(f"if another process was lost, {verdict}; otherwise it is 1", file=sys.stderr, flush=True)
        time.sleep(VERDICT_SECONDS)


def leave(status: int) -> NoReturn:
    """Ends this process; one that failed does not wait for the others, which may be stuck waiting for it.

    An ordinary exit waits up to five minutes for all processes to leave together, as they do when preempted.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and status not in (0, EXIT_PREEMPTED):
        os._exit(status)
    sys.exit(status)


def agree(value: ArrayLike, how: Callable[[np.ndarray], Any] = lambda values: values[0]) -> Any:
    """What `how` makes of the values that all processes give, stacked in their order; by default that of process 0.

    The same on every process, each of which has to call it.
    """
    value = np.asarray(value)
    value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
    return how(value[None] if jax.process_count() == 1 else multihost_utils.process_allgather(value))


def on_main(action: Callable[[], Any]) -> Any:
    """What `action` returns on process 0, on every process; also the `UserError` that it raises there: all end alike.

    JSON must be able to hold it.
    """
    if jax.process_count() == 1:
        return action()
    message = np.zeros(8192, np.uint8)
    if jax.process_index() == 0:
        try:
            text = json.dumps([action(), ""])
        except UserError as error:
            text = json.dumps([None, str(error)[:1000]])
        message[: len(text)] = list(text.encode())
    value, error = json.loads(bytes(agree(message)).rstrip(b"\0"))
    if error:
        raise UserError(error)
    return value


def to_host(x: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """The whole array on every host."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


_told: dict[str, object] = {}


def tell(message: str) -> None:
    """Prints a line to standard error, on process 0 alone, and the same line only once, also of several threads."""
    mine = object()
    first = _told.setdefault(message, mine) is mine  # which is atomic
    if first and (not jax.distributed.is_initialized() or jax.process_index() == 0):
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def ending_on_sigterm(kept: bool = True) -> Iterator[None]:
    """SIGTERM ends this process at once: with EXIT_PREEMPTED where progress is kept as the work goes, else, for launchers
    would begin it again and again, with EXIT_INTERRUPTED.
    """
    said = b"what is done is kept, and the same command continues" if kept else b"nothing of it is kept"

    def end(*_) -> None:
        os.write(2, b"\nSIGTERM: stopped; " + said + b"\n")
        # an exception would be lost in a callback, and other processes may wait for this one
        os._exit(EXIT_PREEMPTED if kept else EXIT_INTERRUPTED)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


class PreemptionGuard:
    """Turns SIGTERM, SIGINT and a time that is over into a stop at the same step on every process.

        with PreemptionGuard() as guard:
            for step in range(first, last):
                ...
                if guard.reached(step):     # the same step everywhere
                    ...                     # save, then exit with EXIT_PREEMPTED

    A second Ctrl-C stops at once. `seconds` count from the first call of `reached` on, which never asks to stop for them.
    With several processes JAX catches SIGTERM and its coordinator agrees on a step that none has passed; process 0 tells
    it by that signal that the time is over.
    """

    def __init__(self, seconds: float = math.inf):
        self._seconds = seconds

    def __enter__(self) -> "PreemptionGuard":
        self._together = jax.distributed.is_initialized()
        self._signalled = False
        self._asked = 0
        self._end: float | None = None
        numbers = (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._catch) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        message = f"\n{signal.Signals(number).name}: saving, then stopping (Ctrl-C: stop at once)\n"
        os.write(2, message.encode())  # a print may not interrupt a print
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; call it on every process for the same increasing steps. Costs 0.4 µs a step."""
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        elif time.monotonic() > self._end and not self._signalled:
            self._signalled = True
            if self._together and jax.process_index() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._together:
            return self._signalled
        return self._agreed(step)

    def ended(self) -> bool:
        """Whether a signal has come since, once there are no more steps; call it on every process, after the last save."""
        return self._agreed(self._asked + 1) if self._together else self._signalled

    def _agreed(self, step: int) -> bool:
        # The agreed step is one more than the last that any process asked for: before the first call that is step 1
        # wherever the run was resumed, and it may lie between two calls when several steps are one dispatch.
        steps = range(self._asked + 1, step + 1)
        self._asked = step
        return any([multihost_utils.reached_preemption_sync_point(each) for each in steps])
