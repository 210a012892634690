#!/bin/bash
# Train on the GPUs of one or several SLURM nodes, one process a GPU. Submit from the top of the checkout:
#
#     sbatch --nodes=4 --time=24:00:00 infra/slurm.sh python -m experiments.cld_cifar10 --workdir /scratch/me/cld_cifar10
#
# What a site needs (--partition, --account, --gpus-per-node, …) is given to sbatch, whose options come before the script and
# override the lines below; on nodes of N GPUs other than 8, give both --gpus-per-node=N and --ntasks-per-node=N, since a
# task takes one GPU, and --cpus-per-task at most the node's cores divided by N. The workdir and the checkout must be on a file system that all nodes share. A run that is preempted
# or reaches its time limit saves, ends with status 75 and is requeued, and SLURM itself requeues a job whose node fails; any
# other failure ends the job.
# `infra/slurm.sh --dry-run COMMAND` prints the commands of a job and runs none.
#
#SBATCH --job-name=gddim
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -u

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi
do_or_print() {
    if [ -z "$dry_run" ]; then
        "$@"
    else # quoted, so that the line is what would run
        printf '%q ' "$@"
        echo
    fi
}

run=${SLURM_SUBMIT_DIR:-$PWD}/infra/run
if [ ! -x "$run" ] || [ $# -eq 0 ]; then
    echo "infra/slurm.sh: submit from the top of the checkout, with a command: sbatch infra/slurm.sh python -m …" >&2
    exit 2
fi

export GDDIM_EXTRAS=${GDDIM_EXTRAS:-cuda}
export JAX_PLATFORMS=cuda,cpu # a node without a working driver is an error, not a slow run
trap : TERM                   # the steps get the signal and save; this script waits for them

do_or_print "$run" true || exit # the environment, once, before every task looks for it
# A task that ends first leaves the others time to finish the save that they share.
do_or_print srun --kill-on-bad-exit=0 --wait=300 "$run" "$@"
status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
