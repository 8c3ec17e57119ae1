#!/bin/bash
# The same run started by torchrun; call it on each machine with its number:
#   NODES=2 NODE=0 HEAD=10.0.0.1 GPUS=8 jobs/torchrun_train.sh train.toml [--resume]
set -euo pipefail
config=$1
shift
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$GPUS" \
    --master-addr "$HEAD" --master-port 29500 \
    --module headrace.trainer.main --config "$config" "$@"
