#!/usr/bin/env bash
# Starts a command in several processes on this machine, each with cores or GPUs of its own. For
# commands whose processes share the work: seqfair_jax.reproduce and seqfair_jax.search.
#
#   launch/local.sh 2 python -m seqfair_jax.reproduce --config=configs/paper_rr.py --workdir=DIR
#
# The first process prints here, the others to local-N.log in $LOGS (here by default). Interrupting
# stops them all, their states saved; the status is 0 if all of theirs are.
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
processes=$1
shift
cores=$(nproc)
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
share=$((cores / processes > 0 ? cores / processes : 1))
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  first=$(((i * share) % cores))
  (
    ((i == 0)) || exec >"${LOGS:-.}/local-$i.log" 2>&1
    ((gpus == 0)) || export CUDA_VISIBLE_DEVICES=$((i % gpus))
    # Where there is no taskset (macOS), the processes share the cores.
    pin=()
    command -v taskset >/dev/null && pin=(taskset -c "$first-$((first + share - 1))")
    exec "${pin[@]}" "$@"
  ) &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  # A trapped signal ends the first wait before the process has saved its state.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  wait "$pid" || status=$?
done
exit "$status"
