#!/usr/bin/env bash
# Qwen3-32B under Slurm: submits a job of 4 nodes that train and 4 that hold SGLang servers.
#
#   examples/qwen3_32b/run.sh RECIPE [--section.key VALUE ...]     RECIPE: forking_20k, then forking_29k; the baseline
#                                                                  beside each: all_tokens_20k, all_tokens_29k
#   examples/qwen3_32b/run.sh RECIPE --check [...]                 reads everything, prints the plan; needs no GPU
#
# In the root of the checkout, which holds models/, data/ and runs/ (../README.md), and which all nodes see under this
# path. Submitted again, it goes on at the last checkpoint. SBATCH_PARTITION, SBATCH_ACCOUNT and the like choose where it
# runs, and what ../cluster/slurm.sbatch reads from the environment is handed on (SERVER_PYTHON, say). Without Slurm:
# ../cluster/README.md and ../kubernetes.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/common.sh"

RANKS=32
TRAIN_NODES=4
export SERVER_NODES=4 SERVER_TENSOR=8 RANKS_PER_NODE=8

[ $# -gt 0 ] || refuse "name a recipe: forking_20k, all_tokens_20k, forking_29k or all_tokens_29k"
recipe=$1 config=$ROOT/examples/qwen3_32b/$1.yaml
[ -f "$config" ] || refuse "$1 is no recipe; the recipes are forking_20k, all_tokens_20k, forking_29k, all_tokens_29k"
shift
if [[ " $* " == *" --check "* ]]; then
    WORLD_SIZE=$RANKS exec "$PYTHON" -m megatron_rlvr.train "$config" "$@"
fi
exec sbatch --nodes $((TRAIN_NODES + SERVER_NODES)) --gpus-per-node 8 \
    --job-name "qwen3_32b_$recipe" "$ROOT/examples/cluster/slurm.sbatch" "$config" "$@"
