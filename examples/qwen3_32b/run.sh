#!/usr/bin/env bash
# Qwen3-32B under Slurm: submits a job of 4 training nodes and 4 nodes with SGLang servers.
#
#   examples/qwen3_32b/run.sh RECIPE [--section.key VALUE ...]     RECIPE: forking_20k, then forking_29k; their
#                                                                  baselines: all_tokens_20k, all_tokens_29k
#   examples/qwen3_32b/run.sh RECIPE --check [...]                 checks settings and files, prints the plan; no GPU
#
# Run it in the root of the checkout, which contains models/, data/ and runs/ (../README.md) and which all nodes see
# under the same path. A job that is submitted again resumes from the last checkpoint. SBATCH_PARTITION, SBATCH_ACCOUNT
# and so on select where it runs. The variables that ../cluster/slurm.sbatch reads, such as SERVER_PYTHON, are passed
# on. Without Slurm, see ../cluster/README.md and ../kubernetes.
set -euo pipefail
MODEL=qwen3_32b
RANKS=32
TRAIN_NODES=4
export SERVER_NODES=4 SERVER_TENSOR=8 RANKS_PER_NODE=8

. "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"
exec sbatch --nodes $((TRAIN_NODES + SERVER_NODES)) --gpus-per-node 8 \
    --job-name "${MODEL}_$recipe" "$ROOT/examples/cluster/slurm.sbatch" "$config" "$@"
