#!/bin/bash
# Trains under torchrun; on each machine: MASTER=node1 NODES=2 NODE=0 jobs/tools/torchrun_train.sh train.toml
set -euo pipefail

config=$1
shift
exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${GPUS:-gpu}" \
    --master-addr "${MASTER:-127.0.0.1}" --master-port "${PORT:-29500}" \
    -m headrace.trainer.main --config "$config" "$@"
