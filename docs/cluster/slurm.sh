#!/usr/bin/env bash
# Runs an experiment on two nodes of eight GPUs: sbatch docs/cluster/slurm.sh paper
# One torchrun a node starts one rank a GPU. The first node's rank 0 prints and writes.
#SBATCH --job-name=expertlane
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --output=expertlane-%j.out

set -euo pipefail

experiment="${1:-paper}"
shift || true # what follows goes to expertlane: --traffic, --timeout-s 300, …

ranks_per_node="${RANKS_PER_NODE:-8}"
first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port="${PORT:-29500}"

# Each task learns its own node's number from Slurm; rank 0 is on the first node.
export experiment ranks_per_node first_node port
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun \
        --nnodes "$SLURM_NNODES" \
        --nproc-per-node "$ranks_per_node" \
        --node-rank "$SLURM_NODEID" \
        --master-addr "$first_node" \
        --master-port "$port" \
        -m expertlane compare "$experiment" --out "results/slurm-$SLURM_JOB_ID" "$@"
' expertlane "$@"
