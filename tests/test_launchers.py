"""The launchers against pretended services: what they ask for, when they start a run again, and when they do not."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from programs import ODD, executable

from gddim.parallel import EXIT_LOST, EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["python", "-m", "experiments.cld_cifar10", "--workdir", "gs://bucket/a run"]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "infra" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gke, gpu, tpu = load("gke"), load("gpu"), load("tpu")


def dry_run(*words: str) -> str:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_all_agree_on_the_status_of_a_preempted_run():
    assert {tpu.PREEMPTED, gpu.PREEMPTED} == {EXIT_PREEMPTED}
    assert f"\n{EXIT_PREEMPTED}) again=1 ;;\n{EXIT_LOST} | 137) " in (ROOT / "infra" / "slurm.sh").read_text()
    assert tpu.ABORTED == EXIT_LOST
    assert f"values: [{EXIT_PREEMPTED}, {EXIT_LOST}]" in (ROOT / "infra" / "jobset.yaml").read_text()


# TPU slices


class Cloud(tpu.Slice):
    """A slice whose gcloud is pretended: each entry of `lives` is what one start of the run ends with on every worker.

    A list has the exit statuses, "gone" takes the slice away during the run, "cut" loses the connection once, "none" is
    a worker without a job, "stuck" one that does not start.
    """

    def __init__(self, lives, there=False):
        super().__init__("n", "p", "z", "v4-32", None, True, False)
        self.lives, self.there, self.commit_there, self.did, self.unseen = list(lives), there, None, [], []

    def gcloud(self, *words, capture=False):
        verb, script = words[1], next((w for w in words if w.startswith("--command=")), "")
        status, out, said = 0, "", ""
        if verb == "describe":
            said = tpu.NOT_FOUND
            status, out = (0, "ACTIVE\n") if self.there else (0, "SUSPENDED\n") if self.did else (1, "")
            if self.unseen:
                status, out, said = 1, "", self.unseen.pop()
        elif verb in ("create", "delete"):
            self.there, self.commit_there = verb == "create", None
            self.did.append(verb)
        elif verb == "scp":
            self.did.append("copy")
        elif "add-apt-repository" in script:
            self.commit_there = True
        elif "job.commit" in script:
            status = 0 if self.commit_there else 1
        elif "setsid" in script:
            status = int(self.lives[0] == "stuck")
            self.did.append("start")
        elif "tail" in script:
            if self.lives[0] in ("cut", "gone"):
                self.there = self.lives.pop(0) == "cut"
                status = 255
            elif self.lives[0] == "none":
                status = tpu.NO_JOB
        elif "job.status" in script:
            out = "".join(f"{s}\n" for s in self.lives.pop(0))
        return subprocess.CompletedProcess(words, status, out, said)


@pytest.mark.parametrize(
    ("lives", "status", "did"),
    [
        ([[0, 0]], 0, "create copy start"),
        ([[75, 75], [0, 0]], 0, "create copy start start"),
        (["gone", [0, 0]], 0, "create copy start delete create copy start"),
        (["cut", [0, 0]], 0, "create copy start"),
        ([[1, 134]], 1, "create copy start"),  # one worker failed, JAX ended the other
        ([[134, 134], [0, 0]], 0, "create copy start start"),  # a host was lost
        ([[75, 75], [2, 2]], 2, "create copy start start"),
        ([[134]], 134, "create copy start"),  # of one worker none was lost
        ([[134, 134]] * 11, 134, "create copy " + "start " * 11),
    ],
)
def test_tpu_starts_again_only_what_was_preempted(lives, status, did, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    cloud = Cloud(lives)
    assert cloud.run(COMMAND) == status
    assert cloud.did == did.split()
    assert cloud.lives == []


def test_tpu_tells_what_does_not_run(monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="did not start on every worker of n"):
        Cloud(["stuck"]).run(COMMAND)
    with pytest.raises(SystemExit, match="no run was ever started on worker 0 of n"):
        Cloud(["cut", "none"], there=True).follow()
    assert "the connection to worker 0 was lost (status 255), trying again" in capsys.readouterr().err


def test_a_slice_that_cannot_be_seen_is_neither_made_nor_given_up(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    cloud = Cloud([])
    cloud.unseen = ["no network"]
    with pytest.raises(SystemExit, match="whether there is a n cannot be told"):
        cloud.create()
    assert cloud.did == []
    waiting = Cloud([], there=True)
    waiting.unseen = ["login expired", "no network"]
    monkeypatch.setattr(waiting, "state", iter(["WAITING_FOR_RESOURCES", "UNKNOWN", "ACTIVE"]).__next__)
    waiting.create()
    assert waiting.did == []


def test_a_slice_that_was_deleted_is_not_made_again(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    cloud = Cloud(["gone"])
    monkeypatch.setattr(cloud, "state", iter(["NONE", "ACTIVE", "NONE"]).__next__)
    with pytest.raises(SystemExit, match="there is no n any more: it was deleted"):
        cloud.run(COMMAND)
    assert cloud.did == ["create", "copy", "start"]


def test_a_worker_runs_one_command_and_tells_another_that_it_is_busy(tmp_path):
    (tmp_path / "gddim").mkdir()
    start = lambda job: subprocess.run(["bash", "-c", tpu.START.format(job=shlex.quote(job))], cwd=tmp_path)
    statuses = [start(job).returncode for job in ("sleep 60 # 'a'", "sleep 60 # 'a'", "sleep 60 # b")]
    subprocess.run(["bash", "-c", "kill $(cat gddim/job.pid)"], cwd=tmp_path)
    assert statuses == [0, 0, 1]


@pytest.mark.parametrize("made", ["", "gddim"])
def test_tpu_worker_without_a_job(tmp_path, made):
    (tmp_path / made).mkdir(exist_ok=True)
    done = [subprocess.run(["bash", "-c", script], cwd=tmp_path).returncode for script in (tpu.FOLLOW, tpu.START)]
    assert done == [tpu.NO_JOB, 0 if made else 1]


def test_tpu_dry_run_leaves_every_file_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tpu, "ROOT", tmp_path)
    monkeypatch.setattr(tpu.Slice, "commit", "c0ffee")
    (tmp_path / tpu.ARCHIVE).write_text("mine")
    tpu.Slice("n", "p", "z", "v4-32", None, True, dry_run=True).copy()
    assert (tmp_path / tpu.ARCHIVE).read_text() == "mine"
    assert "scp" in capsys.readouterr().out


def test_tpu_dry_run_prints_the_exact_commands():
    words = ["run", "n", "--project", "p", "--zone", "z", "--type", "v5p-256", "--spot", "--dry-run", "--", *COMMAND]
    text = dry_run("infra/tpu.py", *words)
    printed = shlex.split(text.replace("\ngcloud", "\n;\ngcloud").replace("\ngit", "\n;\ngit"))
    commands = [group.split("\0") for group in "\0".join(printed).split("\0;\0")]
    kinds = [words[3:5] if words[0] == "gcloud" else words[:1] for words in commands]
    assert kinds[1] == ["queued-resources", "create"]
    assert {"--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5", "--spot"} <= set(commands[1])
    assert " ".join(kind[-1] for kind in kinds) == "describe create describe ssh git scp ssh ssh ssh ssh"
    assert all({"--project=p", "--zone=z"} <= set(words) for words in commands if words[0] == "gcloud")
    script = next(word for words in commands for word in words if "setsid" in word)
    job = shlex.split(re.search(r"setsid nohup sh -c ('.*') >", script)[1])[0]  # pyright: ignore
    assert shlex.split(job.split(";")[0])[2:] == COMMAND


@pytest.mark.parametrize("status", [0, 75, 3])
def test_tpu_worker_scripts_run(tmp_path, status):
    """START, FOLLOW and STATUS as a worker's shell would run them."""
    executable(tmp_path / "gddim" / "infra" / "run", f'#!/bin/sh\necho "$GDDIM_EXTRAS $*"\nsleep 0.5\nexit {status}\n')

    def shell(script: str) -> str:
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=30).stdout

    job = "GDDIM_EXTRAS=tpu,gcs infra/run a 'b c'; echo $? >job.status"
    shell(tpu.START.format(job=shlex.quote(job)))
    shell(tpu.START.format(job=shlex.quote(job)))  # under way: nothing is started
    assert shell(tpu.FOLLOW) == "tpu,gcs a b c\n"
    assert shell(tpu.STATUS) == f"{status}\n"


# Kubernetes


def jobset(*words: str) -> dict:
    return yaml.safe_load(dry_run("infra/gke.py", "run1", "--image", "i:1", *words, "--dry-run", "--", *COMMAND))


TPU = ["--tpu", "tpu-v5p-slice", "--topology", "4x4x8"]
GPU = ["--gpu", "nvidia-h100-80gb", "--nodes", "16"]


@pytest.mark.parametrize(
    ("words", "nodes", "chip", "chips"), [(TPU, 32, "google.com/tpu", 4), (GPU, 16, "nvidia.com/gpu", 8)]
)
def test_jobset_has_what_the_controller_wants(words, nodes, chip, chips):
    whole = jobset(*words)
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert whole["metadata"]["name"] == "run1"
    assert whole["spec"]["failurePolicy"]["maxRestarts"] > 0
    (workers,) = whole["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert job["parallelism"] == job["completions"] == nodes
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # required with a podFailurePolicy
    (container,) = pod["containers"]
    assert (container["image"], container["command"]) == ("i:1", COMMAND)
    assert container["resources"]["limits"] == {chip: chips}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(entry["value"], str) for entry in container["env"])
    assert all(isinstance(value, str) for value in pod["nodeSelector"].values())


def ends_with(job: dict, exit_status: int = 0, disrupted: bool = False) -> str:
    """What the Job controller does with a failed pod: the action of the first rule that matches."""
    for rule in job["podFailurePolicy"]["rules"]:
        if conditions := rule.get("onPodConditions"):
            if disrupted and conditions == [{"type": "DisruptionTarget", "status": "True"}]:
                return rule["action"]
        else:
            codes = rule["onExitCodes"]
            assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
            if (exit_status in codes["values"]) == (codes["operator"] == "In"):
                return rule["action"]
    return "Count"


def test_jobset_starts_again_only_what_was_preempted():
    whole = jobset(*TPU)
    job = whole["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert [ends_with(job, status) for status in (75, 134, 1, 2, 137)] == ["Count", "Count", *["FailJob"] * 3]
    assert ends_with(job, 137, disrupted=True) == "Count"
    # A job failed by the policy fails the whole; one failed by a counted pod falls through to a restart.
    (rule,) = whole["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


def test_jobset_of_gpus_names_its_coordinator():
    whole = jobset(*GPU, "--spot", "--claim", "cifar")
    pod = whole["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"] == f"run1-{whole['spec']['replicatedJobs'][0]['name']}-0-0.run1:{gke.PORT}"
    assert env["JAX_NUM_PROCESSES"] == "16"
    assert env["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == pod["tolerations"][0]["value"] == "true"
    assert pod["volumes"][-1]["persistentVolumeClaim"]["claimName"] == "cifar"


@pytest.mark.parametrize("words", [["Run", *GPU], ["r", "--tpu", "t"], ["r", "--tpu", "t", "--topology", "3x1"]])
def test_gke_refuses_by_name(words):
    words = [sys.executable, "infra/gke.py", *words, "--image", "i", "--", "x"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.match(r"gke.py: error: (name|--topology) ", done.stderr.splitlines()[-1])


# One machine


def machine(folder: Path, script: str) -> list[str]:
    """A command line of infra/gpu.py beside an infra/run that is `script`."""
    executable(folder / "infra" / "run", f"#!/bin/sh\ncd {folder}\n{script}")
    shutil.copy(ROOT / "infra" / "gpu.py", folder / "infra" / "gpu.py")
    return [sys.executable, str(folder / "infra" / "gpu.py"), "--gpus", "0,1", "--", "train", "a b"]


@pytest.mark.parametrize(("statuses", "status"), [((0,), 0), ((75, 75, 0), 0), ((75, 1), 1), ((2,), 2)])
def test_one_machine_starts_again_only_what_was_preempted(tmp_path, statuses, status):
    (tmp_path / "statuses").write_text("".join(f"{s}\n" for s in statuses))
    script = 'echo "$CUDA_VISIBLE_DEVICES $*" >>log\ns=$(head -1 statuses)\nsed -i 1d statuses\nexit $s\n'
    assert subprocess.run(machine(tmp_path, script)).returncode == status
    assert (tmp_path / "log").read_text().splitlines() == ["0,1 train a b"] * len(statuses)


@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
def test_one_machine_ends_when_it_is_asked_to(tmp_path, how):
    script = "trap 'exit 75' INT TERM\necho >>started\nfor i in $(seq 200); do sleep 0.05; done\nexit 1\n"
    process = subprocess.Popen(machine(tmp_path, script), start_new_session=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    if how == "kill":
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "started").read_text() == "\n"


@pytest.mark.parametrize("when", ["between two lives", "at a start"])
def test_one_machine_starts_no_life_after_it_was_told_to_stop(when, monkeypatch):
    lives = []

    def tell(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    def start(*_, **__):
        lives.append(1)
        if when == "at a start" and len(lives) == 2:
            tell()
        return begin(["sh", "-c", "exit 75" if len(lives) == 1 else "sleep 30; exit 75"])

    begin, handlers = subprocess.Popen, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(gpu, "print", tell if when == "between two lives" else print, raising=False)
    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--", "x"])
    began = time.monotonic()
    try:
        status = gpu.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (len(lives), status) == ((1, 75) if when == "between two lives" else (2, 128 + signal.SIGTERM))
    assert time.monotonic() - began < 20


def test_one_machine_dry_run(monkeypatch):
    monkeypatch.delenv("GDDIM_EXTRAS", raising=False)
    words = shlex.split(dry_run("infra/gpu.py", "--gpus", "3", "--dry-run", "--", *COMMAND))
    assert words[:3] == ["GDDIM_EXTRAS=cuda", "JAX_PLATFORMS=cuda,cpu", "CUDA_VISIBLE_DEVICES=3"]
    assert words[3:] == [str(ROOT / "infra" / "run"), *COMMAND]
    text = dry_run("infra/gpu.py", "--gpus", "0, 1;$HOME", "--dry-run", "--", *ODD)
    line = text.replace(str(ROOT / "infra" / "run"), "show").strip()
    shell = 'show() { printf "%s\\n" "$CUDA_VISIBLE_DEVICES" "$@"; }; ' + line
    again = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == ["0, 1;$HOME", *ODD]


def test_no_launcher_names_a_project_or_carries_a_secret():
    for path in (ROOT / "infra").iterdir():
        text = path.read_text() if path.is_file() else ""
        assert not re.search(r"(?i)password|secret|token|api[_-]?key|BEGIN .*PRIVATE", text), path
