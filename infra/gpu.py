#!/usr/bin/env python3
"""Train on the GPUs of this machine, all in one process.

    python3 infra/gpu.py -- python -m experiments.cld_cifar10 --mesh.fsdp=2
    python3 infra/gpu.py --gpus 0,1 -- python -m experiments.cld_cifar10

A run that saved and wants to be started again (exit status 75) is started again, unless it was this script that was
asked to stop: Ctrl-C and `kill` reach the run, which saves and ends.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).with_name("run")
PREEMPTED = 75


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  # on any terminal
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", help="numbers of the GPUs to use, for example 0,1 (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and do nothing")
    parser.add_argument("command", nargs="+", help="after --: what to run")
    given = parser.parse_args()

    # With JAX_PLATFORMS a machine without a working driver is an error, not a slow run.
    chosen = {"CUDA_VISIBLE_DEVICES": given.gpus} if given.gpus else {}
    env = {"GDDIM_EXTRAS": os.environ.get("GDDIM_EXTRAS", "cuda"), "JAX_PLATFORMS": "cuda,cpu", **chosen}
    if given.dry_run:
        quoted = (f"{name}={shlex.quote(value)}" for name, value in env.items())
        print(*quoted, shlex.join([str(RUN), *given.command]))
        return 0

    stopped = False
    child: subprocess.Popen | None = None

    def stop(number: int, _frame) -> None:
        nonlocal stopped
        stopped = True
        if child and number == signal.SIGTERM:  # the terminal itself sends Ctrl-C to both
            child.send_signal(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    status = PREEMPTED
    while status == PREEMPTED and not stopped:
        child = subprocess.Popen([RUN, *given.command], env={**os.environ, **env})
        if stopped:  # by a signal that found no child to be handed to
            child.terminate()
        status = child.wait()
        if status == PREEMPTED and not stopped:
            print("infra/gpu.py: preempted, starting again", file=sys.stderr)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
