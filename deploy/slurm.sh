#!/usr/bin/env bash
# Runs a command of expertlane on two nodes of eight GPUs, one process a node:
#   sbatch deploy/slurm.sh serve MODEL --layout dp=16,ep=16
#   sbatch --time=01:00:00 deploy/slurm.sh compare paper
# serve: the first node runs the HTTP server; the job's output has its address. The API key comes
# from EXPERTLANE_API_KEY, which sbatch passes on. Sixty seconds before the time limit, and at
# `scancel --signal=TERM JOB`, new requests are refused and running ones finish.
# A node after the first whose processes die joins again; the job ends when Slurm loses a node.
# Others: the first node prints and writes; compare writes to results/slurm-JOB.
#SBATCH --job-name=expertlane
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=TERM@60
#SBATCH --output=expertlane-%j.out

set -euo pipefail

if [[ $# -lt 2 || ("$1" == serve && -z "${EXPERTLANE_API_KEY:-}") ]]; then
    echo "usage: EXPERTLANE_API_KEY=… sbatch deploy/slurm.sh serve MODEL --layout LAYOUT" >&2
    echo "       sbatch deploy/slurm.sh compare EXPERIMENT" >&2
    exit 2
fi
command="$1" what="$2"
shift 2 # what follows goes to expertlane: --layout, --timeout-s 300, …

read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port="${PORT:-29500}"
restarts=0 # by torchrun, on nodes after the first
case "$command" in
serve)
    restarts=3
    serve_port="${SERVE_PORT:-8000}"
    # torchrun gives processes 30 s to end, so running requests get 20.
    set -- --host 0.0.0.0 --port "$serve_port" --drain-s 20 "$@"
    echo "serving at http://$first_node:$serve_port/v1 once it is loaded"
    ;;
compare)
    set -- --out "results/slurm-$SLURM_JOB_ID" "$@"
    ;;
esac

# Each task learns its own node's number from Slurm; the launcher is on the first node.
export command what first_node port restarts
# shellcheck disable=SC2016 # the task's own shell is to expand these
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun \
        --nnodes "$SLURM_NNODES" \
        --nproc-per-node 1 \
        --node-rank "$SLURM_NODEID" \
        --max-restarts "$((SLURM_NODEID > 0 ? restarts : 0))" \
        --master-addr "$first_node" \
        --master-port "$port" \
        -m expertlane "$command" "$what" "$@"
' expertlane "$@"
