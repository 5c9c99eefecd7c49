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
MODEL=qwen3_32b
RANKS=32
TRAIN_NODES=4
export SERVER_NODES=4 SERVER_TENSOR=8 RANKS_PER_NODE=8

. "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"
exec sbatch --nodes $((TRAIN_NODES + SERVER_NODES)) --gpus-per-node 8 \
    --job-name "${MODEL}_$recipe" "$ROOT/examples/cluster/slurm.sbatch" "$config" "$@"
