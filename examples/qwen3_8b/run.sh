#!/usr/bin/env bash
# Qwen3-8B on the 8 GPUs of this machine: starts SGLang servers, trains on the same GPUs, and stops the servers at the
# end.
#
#   examples/qwen3_8b/run.sh RECIPE [--section.key VALUE ...]     RECIPE: forking_20k, then forking_29k; their
#                                                                 baselines: all_tokens_20k, all_tokens_29k
#   examples/qwen3_8b/run.sh RECIPE --check [...]                 checks settings and files, prints the plan; no GPU
#
# Run it in the root of the checkout, which contains models/, data/ and runs/ (../README.md). The same command resumes
# from the last checkpoint.
#
#   SERVER_PYTHON   Python that has SGLang, if it is not the trainer's
set -euo pipefail
MODEL=qwen3_8b
RANKS=8
SERVERS=2 SERVER_TENSOR=4
# Fraction of each GPU's memory for the weights and the KV cache of its server; the trainer's memory must fit in the
# rest.
SERVER_SHARE=0.5

. "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"
model=$("$PYTHON" - "$config" "$@" <<'PYTHON_CODE'
import sys

from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.config import SettingsError

try:
    print(load_settings(sys.argv[1], sys.argv[2:]).model.path)
except SettingsError as error:
    sys.exit(f"run: {error}")
PYTHON_CODE
) || exit 2
export GPUS_PER_NODE=$RANKS LOG_DIR=${LOG_DIR:-$PWD/runs/logs/${MODEL}_$recipe}
exec "$PYTHON" "$ROOT/tools/serve.py" "$model" --python "${SERVER_PYTHON:-$PYTHON}" \
    --servers "$SERVERS" --tensor "$SERVER_TENSOR" --colocated --memory-share "$SERVER_SHARE" --restart \
    --run-dir "$LOG_DIR" \
    --then "$ROOT/examples/cluster/torchrun.sh" "$config" --rollout.servers '{servers}' "$@"
