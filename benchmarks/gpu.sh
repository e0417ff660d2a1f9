#!/usr/bin/env bash
# Measurements on a GPU: the training step of one run and of ten runs, in both precisions, on both
# data sets at the paper's size; the loss and the embedding gradient alone; the evaluation; how time
# grows; and 1,000 epochs of ten runs.
#
#     RETAILROCKET=DIR ML1M=DIR benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RETAILROCKET:?the folder of events.csv}" "${ML1M:?the folder of ratings.dat}"
python=${PYTHON:-python}
ten=0,1,2,3,4,5,6,7,8,9
for dtype in bfloat16 tensorfloat32; do
  for seeds in 0 $ten; do
    for data in "rr_erm.py $RETAILROCKET" "ml1m_erm.py $ML1M"; do
      read -r config path <<<"$data"
      $python -m benchmarks.train_step --config="configs/$config" --config.data.path="$path" \
        --config.model.dtype=$dtype --config.seeds=$seeds --steps=128 --parts
    done
  done
  $python -m benchmarks.softmax_loss --config=configs/rr_erm.py --config.model.dtype=$dtype \
    --embedding_gradient
done
$python -m benchmarks.train_step --config=configs/rr_erm.py --config.data.path="$RETAILROCKET" \
  --first_step
$python -m benchmarks.evaluate --config=configs/rr_erm.py --config.data.path="$RETAILROCKET"
$python -m benchmarks.scaling --config=configs/rr_erm.py --config.data.path="$RETAILROCKET" \
  --config.model.dtype=bfloat16 --steps=64
time $python -m seqfair_jax.main --config=configs/rr_erm.py --config.data.path="$RETAILROCKET" \
  --config.model.dtype=bfloat16 --config.seeds=$ten --workdir="$(mktemp -d)/rr_erm"
