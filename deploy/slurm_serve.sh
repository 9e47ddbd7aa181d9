#!/usr/bin/env bash
# Serves a model on two nodes of eight GPUs:
#   sbatch deploy/slurm_serve.sh MODEL --layout dp=16,ep=16
# The first node runs the HTTP server; the job's output has its address. The API key comes from
# EXPERTLANE_API_KEY, which sbatch passes on. Sixty seconds before the time limit, and at
# `scancel --signal=TERM JOB`, new requests are refused and running ones finish.
#SBATCH --job-name=expertlane-serve
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=TERM@60
#SBATCH --output=expertlane-serve-%j.out

set -euo pipefail

if [[ $# -eq 0 || -z "${EXPERTLANE_API_KEY:-}" ]]; then
    echo "usage: EXPERTLANE_API_KEY=… sbatch deploy/slurm_serve.sh MODEL --layout LAYOUT" >&2
    exit 2
fi
model="$1"
shift # what follows goes to expertlane: --layout, --max-model-len, …

read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export model first_node
export port="${PORT:-29500}" serve_port="${SERVE_PORT:-8000}"
echo "serving at http://$first_node:$serve_port/v1 once it is loaded"

# Each task learns its own node's number from Slurm. torchrun gives processes 30 s to end, so
# running requests get 20.
# shellcheck disable=SC2016 # the task's own shell is to expand these
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun \
        --nnodes "$SLURM_NNODES" \
        --nproc-per-node 1 \
        --node-rank "$SLURM_NODEID" \
        --master-addr "$first_node" \
        --master-port "$port" \
        -m expertlane serve "$model" --host 0.0.0.0 --port "$serve_port" --drain-s 20 "$@"
' expertlane "$@"
