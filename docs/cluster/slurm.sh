#!/usr/bin/env bash
# Runs an experiment on two nodes of eight GPUs: sbatch docs/cluster/slurm.sh paper
# One process per node starts that node's ranks. That of the first node prints and writes.
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

read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port="${PORT:-29500}"

# Each task learns its own node's number from Slurm; the launcher is on the first node.
export experiment first_node port
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun \
        --nnodes "$SLURM_NNODES" \
        --nproc-per-node 1 \
        --node-rank "$SLURM_NODEID" \
        --master-addr "$first_node" \
        --master-port "$port" \
        -m expertlane compare "$experiment" --out "results/slurm-$SLURM_JOB_ID" "$@"
' expertlane "$@"
