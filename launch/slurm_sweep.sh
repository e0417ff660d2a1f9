#!/usr/bin/env bash
# Starts a command in every task of a Slurm job array. For commands whose processes share the work:
# `seqfair reproduce` and `seqfair search`. Each task takes jobs that no other task is running.
#
#   sbatch --array=0-7 launch/slurm_sweep.sh seqfair reproduce --config=paper_rr --workdir=DIR
#
# DIR must be on a file system that all machines share and whose locks work between them. Two
# minutes before its time limit a task saves its state, and Slurm starts it again. `scancel` lets it
# save its state, and it stays ended. Options of `sbatch` replace those below.
#SBATCH --job-name=seqfair-sweep
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus=1
#SBATCH --time=24:00:00
#SBATCH --signal=INT@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch
status=0
srun "$@" || status=$?
# The signal before the time limit gives status 130. After `scancel` it is 143.
if ((status == 130)); then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
