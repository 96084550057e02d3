#!/bin/bash
# One run on several nodes by SLURM: one torchrun a node, one process a GPU. Submit from where `runs/` should be, on a
# file system that all nodes see:
#
#     sbatch --nodes 4 examples/slurm.sh llamagen-c2i-xxl --output runs/xxl --set data.source=data/imagenet/train
#
# SLURM signals a run 120 seconds before its time is over; it saves and exits, and the same command with --resume goes on.
#SBATCH --job-name=varpi
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:${PORT:-29500}" \
    --rdzv-id "$SLURM_JOB_ID" \
    -m varpi train "$@"
