"""Start-up and stopping of a job's processes: which job this is, on which devices, and what a signal does."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from gddim import UserError
from gddim.parallel import PreemptionGuard, agree, hosts, on_main
from gddim.parallel.hosts import cluster, tell

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[1-2]"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
SHARED = {**MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # a node of two ranks
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1234"}


@pytest.mark.parametrize(
    ("env", "tpu", "told"),
    [
        ({}, False, None),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False, None),  # a shell in an allocation
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),
        (SLURM, False, {"process_id": 3, "num_processes": 8}),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, False, {"process_id": 1, "num_processes": 4}),
        ({}, True, {}),
        (
            {**ADDRESS, "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            False,
            {"coordinator_address": "host:1234", "process_id": 1, "num_processes": 2},
        ),
        (
            {**ADDRESS, "JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2", **MPI},
            False,
            {"coordinator_address": "host:1234", "process_id": 0, "num_processes": 2},
        ),
        *(
            (ADDRESS | env, False, {"coordinator_address": "host:1234", "process_id": 1, "num_processes": 4, **gpus})
            for env, gpus in (
                (MPI, {}),
                (SHARED, {"local_device_ids": [1]}),
                ({**SHARED, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {}),
                ({**SHARED, "CUDA_VISIBLE_DEVICES": "0,1"}, {"local_device_ids": [1]}),
                ({**SHARED, "CUDA_VISIBLE_DEVICES": "1"}, {}),  # the rank's own
                ({**SHARED, "JAX_LOCAL_DEVICE_IDS": "0"}, {}),
            )
        ),
        # Open MPI 5 inside a SLURM step, whose SLURM_LOCALID is 0 for all of a node's ranks
        ({**SLURM, **SHARED}, False, {"process_id": 1, "num_processes": 4, "local_device_ids": [1]}),
        ({"JAX_NUM_PROCESSES": "1"}, False, None),
        ({"JAX_NUM_PROCESSES": "2"}, True, {}),  # a TPU slice knows its own
    ],
)
def test_which_job_this_process_is_in(env, tpu, told):
    assert cluster(env, tpu) == told


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (ADDRESS, "JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and"),
        (MPI, "4 processes, but no JAX_COORDINATOR_ADDRESS"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set: set JAX_COORDINATOR_ADDRESS"),
        ({"JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "0"}, "2 processes, but no JAX_COORDINATOR_ADDRESS"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID=x: give a whole number"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=: give a whole number"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be below JAX_NUM_"),
    ],
)
def test_half_a_job_is_an_error(env, message):
    with pytest.raises(UserError, match=message):
        cluster(env, False)


@pytest.mark.parametrize(
    ("platforms", "said"),
    [("cpu", ""), ("cuda,cpu", "asks for cuda first, but JAX finds no working one, only cpu"), ("tpu", "tpu: Unable")],
)
def test_a_missing_accelerator_is_an_error(platforms, said):
    if said and any(device.platform != "cpu" for device in jax.devices()):
        pytest.skip("there is one")
    program = "from gddim.parallel import initialize\ntry: initialize()\nexcept Exception as e: print(repr(e))"
    env = {**os.environ, "JAX_PLATFORMS": platforms}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert said in done.stdout
    assert bool(said) == ("UserError" in done.stdout)


@pytest.mark.parametrize(
    ("cores", "batch", "flags", "devices"),
    [
        (2, 64, "", 2),
        (2, 48, "", 1),
        (12, 128, "", 8),
        (1, 64, "", 1),
        (2, 64, "--xla_force_host_platform_device_count=3", 3),
    ],
)
def test_a_cpu_is_as_many_devices_as_cores_have_rows(cores, batch, flags, devices):
    program = f"""
import os
os.cpu_count = lambda: {cores}
import jax
from gddim.parallel import initialize
initialize({batch})
print(len(jax.devices("cpu")))
"""
    env = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == devices


def test_a_signal_after_the_last_step_is_not_lost():
    with PreemptionGuard() as guard:
        assert not guard.reached(1)
        assert not guard.ended()
        os.kill(os.getpid(), signal.SIGTERM)
    assert guard.ended()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_step(number, capfd):
    before = signal.getsignal(number)
    with PreemptionGuard() as guard:
        assert not guard.reached(1)
        os.kill(os.getpid(), number)
        assert guard.reached(2)
    assert signal.getsignal(number) == before
    assert "saving" in capfd.readouterr().err


def test_a_time_that_is_over_stops_at_the_next_step_but_never_before_the_first(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with PreemptionGuard(seconds=5.0) as guard:
        now += 60  # what comes before the first step is not of it
        assert not guard.reached(7)
        now += 4.9
        assert not guard.reached(8)
        now += 0.2
        assert guard.reached(9)
        assert guard.reached(10)
    with PreemptionGuard() as guard:
        assert not guard.reached(1)
        now += 1e9
        assert not guard.reached(2)


def test_a_second_interrupt_stops_at_once(capfd):
    def twice():
        with PreemptionGuard():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()


@pytest.mark.parametrize(
    ("kept", "status", "said"),
    [(True, 75, "what is done is kept, and the same command continues"), (False, 130, "nothing of it is kept")],
)
def test_sigterm_ends_a_process_even_in_a_callback_that_loses_exceptions(kept, status, said):
    code = f"""
import gc, os, signal
from gddim.parallel import ending_on_sigterm
with ending_on_sigterm({kept}):
    gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    gc.collect()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert said in done.stderr


def test_all_processes_agree_on_one_value_and_on_one_error(monkeypatch):
    def refuse():
        raise UserError("no room")

    assert (agree(3), agree(3, np.max), on_main(lambda: "here")) == (3, 3, "here")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda x: np.stack([x, x + x.dtype.type(1)]))
    assert (agree(3), agree(3, np.max), agree(3).dtype) == (3, 4, np.int32)
    assert agree(np.arange(2), lambda both: both.sum(0).tolist()) == [1, 3]
    assert on_main(lambda: ["any", "JSON", None]) == ["any", "JSON", None]
    with pytest.raises(UserError, match="no room"):
        on_main(refuse)


FAILING = """
import os, signal, sys, time
from experiments import points
from gddim.experiment import cli
from gddim.parallel import hosts

hosts.HEARTBEAT_SECONDS, hosts.VERDICT_SECONDS = 10, 30
rank, lost, error = int(os.environ["JAX_PROCESS_ID"]), sys.argv[1] == "lost", eval(sys.argv[2])

def work(command):
    hosts.initialize()
    if rank == 1 and lost:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1 if rank == 0 else 60)
    raise error

cli.execute = work
cli.main(points.EXPERIMENT, ["train"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "error", "status"),
    [
        ("lost", "OSError('the barrier of a save timed out')", -signal.SIGABRT),
        ("lost", "ValueError('UNKNOWN: Gloo all-gather failed')", -signal.SIGABRT),
        ("there", "OSError('disk quota exceeded')", 1),
        ("there", "ValueError('of its own')", 1),
    ],
)
def test_an_error_of_any_kind_ends_with_the_status_of_a_lost_process_where_one_was_lost(other, error, status):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", FAILING, other, error],
            env=env | {"JAX_PROCESS_ID": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    try:
        said = first.communicate(timeout=120)[1]
        assert first.returncode == status, said
        assert error.split("'")[1] in said
    finally:
        second.kill()
        second.communicate()


def test_a_line_is_told_once_and_whole_whatever_threads_tell_it(capfd):
    lines = [f"line {i} of {id(capfd)}" for i in range(20)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(tell, lines * 16))
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(lines)
