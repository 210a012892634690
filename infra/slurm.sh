#!/bin/bash
# Train on the GPUs of one or several SLURM nodes, one process a GPU. Submit from the top of the checkout:
#
#     sbatch --nodes=4 --time=24:00:00 infra/slurm.sh python -m experiments.cld_cifar10 --workdir /scratch/me/cld_cifar10
#
# What a site needs (--partition, --account, --gpus-per-node, …) is given to sbatch, whose options come before the script and
# override the lines below; on nodes of N GPUs other than 8, give both --gpus-per-node=N and --ntasks-per-node=N, since a
# task takes one GPU, and --cpus-per-task at most the node's cores divided by N. On a cluster of CPUs:
#
#     JAX_PLATFORMS=cpu GDDIM_EXTRAS=test sbatch --nodes=4 --gpus-per-node=0 --ntasks-per-node=1 --cpus-per-task=64 \
#         infra/slurm.sh python -m …
#
# The workdir and the checkout must be on a file system that all nodes share. A run that is preempted or reaches its time
# limit saves, ends with status 75 and is requeued; one that has lost a task (killed, or silent for half a minute) ends with
# 134 or 137 and is requeued to go on from its last checkpoint, while the job has had fewer than 10 restarts of any kind.
# SLURM itself requeues a job whose node fails; any other failure ends the job. `scancel --signal=TERM JOB` makes it save
# and be requeued, `scancel JOB` save (for as long as the site's KillWait allows) and end.
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
# On GPUs a node without a working driver is an error, not a slow run; sbatch hands over what its caller has set.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # which srun does not take from sbatch any more since 22.05
trap : TERM # the steps get the signal and save; this script waits for them

do_or_print "$run" true || exit # the environment, once, before every task looks for it
# JAX ends with 134 the tasks that are left, whether another one was killed (137) or failed by itself, and srun tells only
# their highest status. So a task that fails by itself sees to it that the job is not requeued.
# shellcheck disable=SC2016 # for the tasks' shell
task='trap : TERM; "$@"; s=$?; [[ $s =~ ^(0|75|130|134|137|143)$ ]] || scontrol update JobId="$SLURM_JOB_ID" Requeue=0; exit $s'
# A task that ends first leaves the others time to finish the save that they share.
do_or_print srun --kill-on-bad-exit=0 --wait=300 bash -c "$task" infra/slurm.sh "$run" "$@"
status=$?
case $status in
143) again=1 ;; # the signal came before the run knew how to save
75) again=1 ;;
134 | 137) again=$((${SLURM_NTASKS:-1} > 1 && ${SLURM_RESTART_COUNT:-0} < 10)) ;;
*) again=0 ;;
esac
if [ "$again" = 1 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != COMPLETING ]; then # not cancelled
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
