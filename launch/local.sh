#!/usr/bin/env bash
# Starts a command several times on this Linux machine. Each process gets its own cores, and its own
# GPU if there are any. For commands whose processes share the work: `seqfair reproduce` and
# `seqfair search`.
#
#   launch/local.sh 2 seqfair reproduce --config=configs/paper_rr.py --workdir=DIR
#
# The first process prints to this terminal, the others to local-N.log in $LOGS (by default the
# current folder). Ctrl-C stops all of them, and each saves its state. The exit status is 0 if every
# process ends with 0.
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
processes=$1
shift

# List the cores that this process may use: "0-3,6" becomes 0 1 2 3 6.
cores=()
IFS=, read -ra ranges <<<"$(taskset -cp $$ | sed 's/.*: //')"
for range in "${ranges[@]}"; do
  for ((core = ${range%-*}; core <= ${range#*-}; core++)); do cores+=("$core"); done
done
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then  # an empty value hides all GPUs
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
else
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
fi
most=$((${#gpus[@]} ? ${#gpus[@]} : ${#cores[@]}))
if ((processes > most)); then
  echo "$processes processes, but ${#cores[@]} cores and ${#gpus[@]} GPUs: at most $most" >&2
  exit 2
fi
share=$((${#cores[@]} / processes > 0 ? ${#cores[@]} / processes : 1))
pids=()
# Each process runs in its own process group, so Ctrl-C reaches only this script. A process would
# take the terminal's signal and this script's as two, and the second ends it without saving.
set -m
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  (
    ((i == 0)) || exec >"${LOGS:-.}/local-$i.log" 2>&1
    ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[i]}
    own=("${cores[@]:i * share % ${#cores[@]}:share}")
    exec taskset -c "$(IFS=, && echo "${own[*]}")" "$@"
  ) &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  # A signal interrupts `wait`, so wait again until the process has ended.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  wait "$pid" || status=$?
done
exit "$status"
