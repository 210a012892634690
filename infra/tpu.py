#!/usr/bin/env python3
"""Train on a TPU pod slice: create it, copy the project, run on all its workers, start again when it is preempted.

    python3 infra/tpu.py run NAME --project P --zone Z --type v4-32 --spot -- \\
        python -m experiments.cld_cifar10 --workdir gs://BUCKET/cld_cifar10

`run` makes the slice if there is none, follows worker 0's output and ends with the run's exit status; interrupted
(Ctrl-C, a lost connection), it leaves the training alone and takes it up again when called again. The other verbs are
its single steps. Needs Python 3.11, git, and the gcloud command with your own login; `--dry-run` prints the commands.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREEMPTED = 75  # the run saved its state and wants to be started again
ABORTED = 134  # JAX ended this worker because another one was lost
LOSSES = 10
NOT_FOUND = "NOT_FOUND"  # as gcloud says it of what is not there
NO_JOB = 66  # of FOLLOW, where nothing was ever started
RUNTIMES = {"v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
ARCHIVE = "gddim.tar.gz"

# On every worker: Python if its image has none that is new enough, then the project and its environment.
SET_UP = """set -e
python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {{
    sudo add-apt-repository -y ppa:deadsnakes/ppa
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y python3.12-venv
}}
mkdir -p gddim
tar -xzf gddim.tar.gz -C gddim
GDDIM_EXTRAS=tpu,gcs gddim/infra/run true
echo {commit} >gddim/job.commit"""

# Whether that is done for this commit, or a run is under way, under which nothing may change.
IS_SET_UP = """cd gddim && {{ kill -0 "$(cat job.pid)" || [ "$(cat job.commit)" = {commit} ]; }} 2>/dev/null"""

# The run outlives the connection; its process and, at the end, its exit status are noted in files.
START = """cd gddim || exit
if kill -0 "$(cat job.pid 2>/dev/null)" 2>/dev/null; then
    [ "$(cat job.command 2>/dev/null)" = {job} ] && exit 0
    echo "another command is under way: $(cat job.command)" >&2
    exit 1
fi
rm -f job.status
printf '%s\\n' {job} >job.command
export JAX_PLATFORMS=tpu,cpu
setsid nohup sh -c {job} >job.log 2>&1 </dev/null &
echo $! >job.pid"""
FOLLOW = f"[ -f gddim/job.pid ] || exit {NO_JOB}; cd gddim && tail -n +1 -F --pid=$(cat job.pid) job.log"
STATUS = "cd gddim && for i in $(seq 120); do [ -f job.status ] && break; sleep 1; done; cat job.status"


@dataclass
class Slice:
    """One TPU pod slice, as the gcloud command sees it."""

    name: str
    project: str
    zone: str
    type: str | None
    runtime: str | None
    spot: bool
    dry_run: bool

    def gcloud(self, *words: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
        """One `gcloud compute tpus` command; a dry run prints it and takes it for done."""
        if not self.dry_run and not shutil.which("gcloud"):
            sys.exit("tpu.py: there is no gcloud on PATH: install Google Cloud's command line, and log in")
        command = ["gcloud", "compute", "tpus", *words, f"--project={self.project}", f"--zone={self.zone}"]
        if self.dry_run:
            print(shlex.join(command))
            return subprocess.CompletedProcess(command, 0, "")
        where = subprocess.PIPE if capture else None
        answer = subprocess.run(command, text=True, stdout=where, stderr=where)
        if answer.stderr and NOT_FOUND not in answer.stderr:
            print(answer.stderr, end="", file=sys.stderr)
        return answer

    def must(self, *words: str) -> None:
        if status := self.gcloud(*words).returncode:
            sys.exit(f"tpu.py: `gcloud compute tpus {' '.join(words[:2])}` failed with status {status}")

    def ssh(self, worker: str, script: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
        return self.gcloud("tpu-vm", "ssh", self.name, f"--worker={worker}", f"--command={script}", capture=capture)

    def state(self) -> str:
        """ACTIVE when it can be used, NONE when there is none, UNKNOWN where gcloud says why it cannot tell."""
        answer = self.gcloud("queued-resources", "describe", self.name, "--format=value(state.state)", capture=True)
        if answer.returncode:
            return "NONE" if NOT_FOUND in answer.stderr else "UNKNOWN"
        return "ACTIVE" if self.dry_run else answer.stdout.strip()

    def create(self) -> None:
        """Ask for the slice, unless it was asked for before, and wait until it is there."""
        state = self.state()
        if state == "UNKNOWN":
            sys.exit(f"tpu.py: whether there is a {self.name} cannot be told, see above")
        if state in {"FAILED", "SUSPENDING", "SUSPENDED"}:
            self.delete()
        if self.dry_run or state in {"FAILED", "SUSPENDING", "SUSPENDED", "NONE"}:
            if self.type is None:
                sys.exit("tpu.py: creating a slice needs --type, for example --type v4-32")
            runtime = self.runtime or RUNTIMES.get(self.type.split("-")[0], "tpu-ubuntu2204-base")
            kind = [f"--node-id={self.name}", f"--accelerator-type={self.type}", f"--runtime-version={runtime}"]
            self.must("queued-resources", "create", self.name, *kind, *["--spot"] * self.spot)
        while (now := self.state()) != "ACTIVE":
            if now != state:
                print(f"{self.name}: {now}", file=sys.stderr)
            if now in {"FAILED", "SUSPENDED", "NONE"}:
                sys.exit(f"tpu.py: {self.name} was not granted: {now}")
            state = now
            time.sleep(20)

    @property
    def commit(self) -> str:
        try:
            return subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"tpu.py: the last commit is what is copied, and git does not tell it: {error}")

    def copy(self) -> None:
        """Bring the last commit and its environment to every worker."""
        archive = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={ROOT / ARCHIVE}", "HEAD"]
        print(shlex.join(archive)) if self.dry_run else subprocess.run(archive, check=True)
        try:
            self.must("tpu-vm", "scp", str(ROOT / ARCHIVE), f"{self.name}:{ARCHIVE}", "--worker=all")
        finally:
            if not self.dry_run:
                (ROOT / ARCHIVE).unlink(missing_ok=True)
        self.must("tpu-vm", "ssh", self.name, "--worker=all", f"--command={SET_UP.format(commit=self.commit)}")

    def delete(self) -> None:
        self.must("queued-resources", "delete", self.name, "--force", "--quiet")

    def follow(self) -> list[int] | None:
        """Show worker 0's output until its run ends; the exit status of every worker, or None if they are gone."""
        while status := self.ssh("0", FOLLOW).returncode:
            if status == NO_JOB:
                sys.exit(f"tpu.py: no run was ever started on worker 0 of {self.name}: start one with `run`")
            if (state := self.state()) not in {"ACTIVE", "UNKNOWN"}:
                if state == "NONE":  # what was taken away is SUSPENDED
                    sys.exit(f"tpu.py: there is no {self.name} any more: it was deleted")
                print(f"{self.name}: {state}", file=sys.stderr)
                return None
            # ssh's own 255, of which gcloud makes a 1: the connection, not what runs at its other end.
            print(f"{self.name}: the connection to worker 0 was lost (status {status}), trying again", file=sys.stderr)
            time.sleep(20)
        answer = self.ssh("all", STATUS, capture=True)
        return [0] if self.dry_run else [int(line) for line in answer.stdout.split()] if not answer.returncode else None

    def run(self, command: list[str]) -> int:
        """Start the command on all workers, again for as long as it is preempted, or, up to `LOSSES` times in a row, loses
        one; the exit status of the last time."""
        losses, commit = 0, self.commit
        job = f"GDDIM_EXTRAS=tpu,gcs infra/run {shlex.join(command)}; echo $? >job.status"
        while True:
            self.create()
            missing = self.ssh("all", IS_SET_UP.format(commit=commit)).returncode
            if missing or self.dry_run:
                self.copy()
            status = self.ssh("all", START.format(job=shlex.quote(job))).returncode
            if status:
                sys.exit(f"tpu.py: the run did not start on every worker of {self.name} (status {status}), see above")
            statuses = self.follow() or [PREEMPTED]
            if failures := set(statuses) - {0, PREEMPTED, ABORTED}:
                return max(failures)
            if not any(statuses):
                return 0
            losses = losses + 1 if ABORTED in statuses else 0
            if losses > LOSSES or statuses == [ABORTED]:  # of a single worker none was lost: it failed
                return ABORTED
            print(f"{self.name}: preempted, starting again", file=sys.stderr)


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  # on any terminal
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "create", "copy", "logs", "delete"])
    parser.add_argument("name", help="name of the slice")
    parser.add_argument("--project", required=True, help="Google Cloud project")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--type", help="accelerator type, for example v4-32, v5p-256, v5litepod-16, v6e-64")
    parser.add_argument("--runtime", help="version of the machine image (default: the one for the type)")
    parser.add_argument("--spot", action="store_true", help="ask for capacity that may be taken away, at a lower price")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    words, command = sys.argv[1:], []
    if "--" in words:
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    given = vars(parser.parse_args(words))
    verb = given.pop("verb")
    if bool(command) != (verb == "run"):
        parser.error("`run` takes a command after --, the other verbs take none")
    tpu = Slice(**given)
    try:
        if verb == "run":
            try:
                return tpu.run(command)
            finally:
                if not tpu.dry_run:
                    print(f"what there is of {tpu.name} goes on being paid for until `delete`", file=sys.stderr)
        if verb == "logs":
            return max(tpu.follow() or [PREEMPTED])
        {"create": tpu.create, "copy": tpu.copy, "delete": tpu.delete}[verb]()
    except KeyboardInterrupt:
        print(f"\ntpu.py: {tpu.name} goes on by itself; `run` or `logs` takes it up again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
