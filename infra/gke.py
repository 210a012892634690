#!/usr/bin/env python3
"""Train on a GKE cluster, on a TPU slice or on GPU nodes, as the JobSet of infra/jobset.yaml.

    python3 infra/gke.py NAME --image IMAGE --tpu tpu-v5p-slice --topology 4x4x8 -- COMMAND…
    python3 infra/gke.py NAME --image IMAGE --gpu nvidia-h100-80gb --nodes 8 -- COMMAND…

    kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0     its output
    kubectl delete jobset NAME                                                                            its end

IMAGE is one that the cluster can pull, built from the Dockerfile with `--build-arg ACCELERATOR=tpu` (or cuda) and
`--build-arg EXTRAS=gcs`; COMMAND wants a workdir that all pods see, such as gs://BUCKET/RUN, which the service account
may write. Needs Python 3.11 and kubectl with your own credentials; `--dry-run` prints the manifest and the command.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_name("jobset.yaml")
PORT = 8476  # of the process that the others report to, on GPU nodes; a TPU slice knows its own


def manifest(given: argparse.Namespace) -> str:
    """The JobSet, as YAML whose values are JSON."""
    if given.tpu:
        nodes = math.prod(map(int, given.topology.split("x"))) // given.chips_per_node
        label = "cloud.google.com/gke-tpu"
        selector = {f"{label}-accelerator": given.tpu, f"{label}-topology": given.topology}
        env = {"JAX_PLATFORMS": "tpu,cpu"}
        chips = {"google.com/tpu": given.chips_per_node}
        # The TPU's driver locks memory and opens devices of root's.
        pod_security, container_security = {"runAsUser": 0}, {"privileged": True}
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    else:
        nodes = given.nodes
        selector = {"cloud.google.com/gke-accelerator": given.gpu}
        address = f"{given.name}-workers-0-0.{given.name}:{PORT}"
        env = {"JAX_PLATFORMS": "cuda,cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(nodes)}
        env["LD_LIBRARY_PATH"] = "/usr/local/nvidia/lib64"  # where GKE mounts the driver; the image does not look there
        chips = {"nvidia.com/gpu": given.gpus_per_node}
        pod_security, container_security = {"runAsNonRoot": True, "fsGroup": 1000}, {"allowPrivilegeEscalation": False}
        annotations = {}
    tolerations = []
    if given.spot:
        spot = "cloud.google.com/gke-spot"
        selector[spot] = "true"
        tolerations = [{"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    volumes: list[dict] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # NCCL wants more than the usual 64 MB
    mounts: list[dict] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if given.claim:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": given.claim, "readOnly": True}})
        mounts.append({"name": "data", "mountPath": "/data", "readOnly": True})
    values = {
        "name": given.name,
        "annotations": annotations,
        "nodes": nodes,
        "node_selector": selector,
        "tolerations": tolerations,
        "service_account": given.service_account,
        "pod_security": pod_security,
        "container_security": container_security,
        "image": given.image,
        "command": given.command,
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "resources": {"limits": chips},
        "mounts": mounts,
        "volumes": volumes,
    }
    return Template(TEMPLATE.read_text()).substitute({name: json.dumps(value) for name, value in values.items()})


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  # on any terminal
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the run, at most 40 of a-z, 0-9 and -")
    parser.add_argument("--image", required=True)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tpu", help="the nodes' gke-tpu-accelerator, for example tpu-v5p-slice, tpu-v6e-slice")
    kind.add_argument("--gpu", help="the nodes' gke-accelerator, for example nvidia-h100-80gb")
    parser.add_argument("--topology", help="of the TPU slice, for example 4x4x8")
    parser.add_argument("--chips-per-node", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=1, help="with GPUs")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--spot", action="store_true", help="nodes that may be taken away, at a lower price")
    parser.add_argument("--claim", help="a PersistentVolumeClaim with data sets, mounted read-only at /data")
    parser.add_argument("--service-account", default="default", help="of Kubernetes, with access to the workdir")
    parser.add_argument("--context", help="the cluster, a context of kubectl (default: the current one)")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest and the command and do nothing")
    parser.add_argument("command", nargs="+", help="after --: what every pod runs")
    given = parser.parse_args()
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", given.name):
        parser.error(f"name {given.name!r}: give at most 40 of a-z, 0-9 and -, beginning with a letter")
    if given.tpu and not re.fullmatch(r"\d+x\d+(x\d+)?", given.topology or ""):
        parser.error(f"--topology {given.topology}: give the one of the TPU slice, such as 4x4 or 4x4x8")
    if given.tpu and math.prod(map(int, given.topology.split("x"))) % given.chips_per_node:
        parser.error(f"--topology {given.topology} does not divide into nodes of {given.chips_per_node} chips")

    text = manifest(given)
    kubectl = ["kubectl", *([f"--context={given.context}"] if given.context else []), "apply", "-f", "-"]
    if given.dry_run:
        print(text, f"# {shlex.join(kubectl)}", sep="")
        return 0
    if not shutil.which("kubectl"):
        parser.error("there is no kubectl on PATH: install it, or look at what it would be given by --dry-run")
    return subprocess.run(kubectl, input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main())
