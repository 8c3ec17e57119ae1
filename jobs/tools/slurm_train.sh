#!/bin/bash
# Trains on several machines under SLURM: sbatch jobs/tools/slurm_train.sh train.toml [--resume]
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@180
set -euo pipefail

master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEADRACE_SECRET=${HEADRACE_SECRET:-$(head -c 24 /dev/urandom | base64)}
# a launcher on each machine; SIGTERM, three minutes before the time is up, saves and ends with 0
exec srun --kill-on-bad-exit=1 bash -c \
    'exec headrace train "$@" --gpus "$0" --nodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
        --master '"$master" "${SLURM_GPUS_ON_NODE:-8}" "$@"
