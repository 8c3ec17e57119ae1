#!/bin/bash
# One training run over several machines of a SLURM cluster; the environment, shards and output_dir
# are at the same path on all of them:
#   sbatch --nodes 2 --gpus-per-node 8 jobs/slurm_train.sh train.toml [--resume] [--set key=value]
#SBATCH --job-name=headrace
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# --signal sends SIGTERM two minutes before the time is up: the run saves, and --resume continues it.
exec srun --kill-on-bad-exit=1 bash -c '
    exec headrace train "$@" --gpus "$SLURM_GPUS_ON_NODE" --nodes "$SLURM_NNODES" \
        --node-rank "$SLURM_NODEID" --master-addr "$0" --master-port 29500' "$head_node" "$@"
