#!/bin/bash
# Training on several machines under SLURM, then the other stages on the first of them:
#   sbatch --nodes 2 --gpus-per-node 8 recipes/accelerate/slurm.sh RECIPE [section.key=value ...]
# From the repository, with its environment active; its folder, and the caches of qlora and of Hugging Face, lie where
# all machines see them. Submitted again, or requeued, it goes on from the last checkpoint.
#SBATCH --job-name=qlora
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
set -euo pipefail
export FIRST PROCESSES
read -r FIRST < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
PROCESSES=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}))
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file recipes/accelerate/nodes.yaml \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$FIRST" --main_process_port "${PORT:-29500}" scripts/train.py "$@"' train "$@"
qlora run "$@"
