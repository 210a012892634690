"""infra/slurm.sh: against a pretended SLURM, and against a real one of this machine alone."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import ODD, executable

from gddim.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parents[1]

# One task runs after the other, and ends with its number of STATUSES; Requeue=0 keeps its word.
SRUN = """#!/bin/sh
highest=0
echo srun "$*" >>log
shift 2
for STATUS in $STATUSES; do
    STATUS=$STATUS "$@"
    s=$?
    [ $s -gt $highest ] && highest=$s
done
exit $highest
"""
SCONTROL = """#!/bin/sh
echo scontrol "$*" >>log
if [ "$1" = update ]; then touch final; else ! [ -e final ]; fi
"""


@pytest.mark.parametrize(
    ("statuses", "restarts", "state", "status", "requeued"),
    [
        ("0 0", 0, "RUNNING", 0, False),
        ("75 75", 0, "RUNNING", 75, True),
        ("75 75", 99, "RUNNING", 75, True),
        ("143", 0, "RUNNING", 143, True),  # the signal came before the run knew how to save
        ("1 1", 0, "RUNNING", 1, False),
        ("1 134", 0, "RUNNING", 134, False),  # one failed by itself, and JAX ended the other
        ("134 134", 0, "RUNNING", 134, True),  # one was silent
        ("134 137", 9, "RUNNING", 137, True),  # one was killed
        ("134 137", 10, "RUNNING", 137, False),
        ("137", 0, "RUNNING", 137, False),
        ("134", 0, "RUNNING", 134, False),
        ("75 75", 0, "COMPLETING", 75, False),  # cancelled
    ],
)
def test_slurm_requeues_what_was_preempted_or_lost_a_task(tmp_path, statuses, restarts, state, status, requeued):
    executable(tmp_path / "infra" / "run", '#!/bin/sh\n[ "$1" = true ] || exit "$STATUS"\n')
    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / "bin" / "scontrol", SCONTROL)
    executable(tmp_path / "bin" / "squeue", f"#!/bin/sh\necho {state}\n")
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17"}
    env |= {"SLURM_NTASKS": str(len(statuses.split())), "STATUSES": statuses, "SLURM_RESTART_COUNT": str(restarts)}
    script = [ROOT / "infra" / "slurm.sh", "python", "-m", "x"]
    assert subprocess.run(script, env=env, cwd=tmp_path).returncode == status
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0].startswith("srun --kill-on-bad-exit=0 --wait=300 ")
    assert log[0].endswith(f" {tmp_path}/infra/run python -m x")
    assert ("scontrol requeue 17" in log and not (tmp_path / "final").exists()) == requeued


@pytest.mark.parametrize(
    ("caller", "task"), [({}, "cuda cuda,cpu"), ({"JAX_PLATFORMS": "cpu", "GDDIM_EXTRAS": "test"}, "test cpu")]
)
def test_slurm_lets_the_settings_of_its_caller_stand(tmp_path, caller, task):
    executable(tmp_path / "infra" / "run", '#!/bin/sh\necho "$GDDIM_EXTRAS $JAX_PLATFORMS" >>log\n')
    executable(tmp_path / "bin" / "srun", "#!/bin/sh\n")
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)} | caller
    assert subprocess.run([ROOT / "infra" / "slurm.sh", "x"], env=env, cwd=tmp_path).returncode == 0
    assert (tmp_path / "log").read_text() == f"{task}\n"


def test_slurm_steps_have_the_cpus_of_the_job(tmp_path):
    executable(tmp_path / "infra" / "run", "#!/bin/sh\n")
    executable(tmp_path / "bin" / "srun", '#!/bin/sh\necho "$SRUN_CPUS_PER_TASK" >log\n')
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "64"}
    assert subprocess.run([ROOT / "infra" / "slurm.sh", "x"], env=env, cwd=tmp_path).returncode == 0
    assert (tmp_path / "log").read_text() == "64\n"


def test_slurm_dry_run_and_refusal(tmp_path):
    done = subprocess.run(["infra/slurm.sh", "--dry-run", *ODD], cwd=ROOT, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert shlex.split(first) == [f"{ROOT}/infra/run", "true"]
    assert shlex.split(second)[-len(ODD) - 1 :] == [f"{ROOT}/infra/run", *ODD]
    shell = f"srun() {{ printf '%s\\n' \"$@\"; }}; {second}"
    again = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[-len(ODD) :] == ODD
    done = subprocess.run([ROOT / "infra" / "slurm.sh", "python"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# A real one: its daemons run in a folder as this user, with a key, a configuration and ports of their own.

CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
FirstJobId={job}
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=localhost Default=YES
"""


def wait_for(what: Callable[[], object], log: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.5)


class Cluster:
    """The client commands of a SLURM, and a checkout whose infra/run is this interpreter's.

    It notes each task's process in pid-TASK, and adds the words of the file `more`.
    """

    def __init__(self, folder: Path, path: str):
        self.folder, self.log = folder, folder / "log"
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env = mine | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "XLA_FLAGS": ""}
        self.env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        run = f'echo $$ >{folder}/pid-$SLURM_PROCID\nexec "$@" $(cat {folder}/more)\n'
        run = f"#!/bin/sh\nexport PATH={Path(sys.executable).parent}:$PATH\n{run}"
        executable(folder / "infra" / "run", run)
        (folder / "more").touch()

    def __call__(self, *words: str) -> str:
        return subprocess.run(words, env=self.env, cwd=self.folder, capture_output=True, text=True, check=True).stdout

    def submit(self, *command: str) -> str:
        self.log.unlink(missing_ok=True)
        words = ["--parsable", f"--output={self.log}", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1"]
        return self("sbatch", *words, str(ROOT / "infra" / "slurm.sh"), *command).strip()

    def is_now(self, job: str, **expected: str) -> bool:
        shown = dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))
        return expected.items() <= shown.items()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]:
        pytest.skip(f"no {missing[0]}: Debian and Ubuntu have it in slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder, path)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    host, user = socket.gethostname().split(".")[0], str(os.getuid())
    names = {"host": host, "user": user, "ports": ports, "folder": folder, "job": 1 + os.getpid() % 4000}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**names))
    files = {"key-file": "munge.key", "seed-file": "munge.seed", "log-file": "munge.log", "pid-file": "munge.pid"}
    munge = [f"--{name}={folder / file}" for name, file in [*files.items(), ("socket", "munge.socket")]]
    with contextlib.ExitStack() as stack:
        log = folder / "daemons"
        for words in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemon = subprocess.Popen(
                words, env=cluster.env, cwd=folder, stdout=log.open("a"), stderr=subprocess.STDOUT
            )
            stack.callback(daemon.wait, 30)
            stack.callback(daemon.terminate)
            wait_for((folder / "munge.socket").exists, log)
        wait_for(
            lambda: " idle " in subprocess.run(["sinfo"], env=cluster.env, capture_output=True, text=True).stdout, log
        )
        stack.callback(wait_for, lambda: not cluster("squeue", "--noheader"), cluster.log)
        stack.callback(cluster, "scancel", "--user", user)
        yield cluster


@pytest.mark.slow
def test_a_run_goes_on_after_a_signal_and_after_the_loss_of_a_task(cluster):
    options = ["--train.report-every=10", "--train.save-every=100", "--train.batch=32", "--net.width=16"]
    command = ["python", "-m", "experiments.points", "train", f"--workdir={cluster.folder / 'run'}", *options]
    more = cluster.folder / "more"
    more.write_text("--train.steps=1000000")
    job = cluster.submit(*command)
    workdir = cluster.folder / "run"

    wait_for(lambda: "step 20/" in cluster.said(), cluster.log)
    cluster("scancel", "--signal=TERM", job)
    wait_for(lambda: cluster.is_now(job, JobState="PENDING", Restarts="1"), cluster.log)
    ended = re.findall(r"tasks? (.*): Exited with exit code 75", cluster.said())
    assert set("".join(ended)) - {"-"} == {"0", "1"}
    (saved,) = map(int, re.findall(r"saved at step (\d+) of 1000000", cluster.said()))
    assert saved in Checkpointer(workdir / "checkpoints").steps()

    cluster("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM itself waits for two minutes
    wait_for(lambda: f"training from step {saved} " in cluster.said(), cluster.log)
    wait_for(lambda: f"step {saved // 10 * 10 + 20}/" in cluster.said(), cluster.log)
    os.kill(int((cluster.folder / "pid-0").read_text()), signal.SIGKILL)
    wait_for(lambda: cluster.is_now(job, JobState="PENDING", Restarts="2"), cluster.log)
    assert "task 0: Exited with exit code 137" in cluster.said()
    assert "task 1: Exited with exit code 134" in cluster.said()

    more.write_text(f"--train.steps={saved + 500}")
    cluster("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: cluster.is_now(job, JobState="COMPLETED", ExitCode="0:0", Restarts="2"), cluster.log)
    assert Checkpointer(workdir / "checkpoints").steps()[-1] == saved + 500


@pytest.mark.slow
def test_a_job_ends_where_a_task_fails_by_itself_or_it_is_cancelled(cluster):
    job = cluster.submit("sh", "-c", "[ $SLURM_PROCID = 0 ] && exit 1; sleep 1; exit 134")
    wait_for(lambda: cluster.is_now(job, JobState="FAILED", ExitCode="134:0", Restarts="0"), cluster.log)
    job = cluster.submit("sh", "-c", "trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done")
    wait_for(lambda: cluster.said().count("ready") == 2, cluster.log)
    cluster("scancel", job)
    wait_for(lambda: cluster.is_now(job, JobState="CANCELLED", Restarts="0"), cluster.log)
    assert "Exited with exit code 75" in cluster.said()
