#!/usr/bin/env bash
# Starts a command in several processes on this (Linux) machine, each with cores of its own, and a
# GPU of its own where there are any. For commands whose processes share the work:
# seqfair_jax.reproduce and seqfair_jax.search.
#
#   launch/local.sh 2 python -m seqfair_jax.reproduce --config=configs/paper_rr.py --workdir=DIR
#
# The first process prints here, the others to local-N.log in $LOGS (here by default). Interrupting
# stops them all, their states saved; the status is 0 if all of theirs are.
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
processes=$1
shift

# The cores that this process may use, 0-3,6, one by one.
cores=()
IFS=, read -ra ranges <<<"$(taskset -cp $$ | sed 's/.*: //')"
for range in "${ranges[@]}"; do
  for ((core = ${range%-*}; core <= ${range#*-}; core++)); do cores+=("$core"); done
done
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then  # to nothing hides them all
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
  # A trapped signal ends the first wait before the process has saved its state.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  wait "$pid" || status=$?
done
exit "$status"
