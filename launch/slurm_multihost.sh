#!/usr/bin/env bash
# Trains one model on several machines of a Slurm cluster: one process for each GPU, which
# `jax.distributed` connects. The product of the axes of `train.mesh` is the number of GPUs.
#
#   sbatch --nodes=2 launch/slurm_multihost.sh \
#     seqfair train --config=rr_gdro --workdir=DIR --config.train.mesh.data=8
#
# The script adds `--distributed` to the command. DIR must be on a file system that all machines
# share. Two minutes before the time limit the training saves its state, and Slurm starts it again.
# `scancel` lets it save its state, and it stays ended. Options of `sbatch` replace those below.
#SBATCH --job-name=seqfair
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=INT@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch
status=0
# Every process sees all GPUs of its machine: JAX takes the one with the process's local number.
# If a process is lost, JAX ends the others. Slurm must not: when all have saved their state, the
# first to end would stop those that still write.
srun --gpu-bind=none --kill-on-bad-exit=0 "$@" --distributed || status=$?
# The signal before the time limit gives status 130. After `scancel` it is 143.
if ((status == 130)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
