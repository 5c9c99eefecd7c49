#!/usr/bin/env bash
# Measures everything that needs one GPU, in at most 25 minutes and without a network: gpu_day.sh [OPTIONS]
#
# PYTHON (default python3) needs torch; what else is missing there is named, and left out. Packages in build/gpu_day, put
# there by `pip install --target` on another machine, are found. Writes gpu_day.json and gpu_day.md; --help has the options.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/benchmarks:$root/build/gpu_day${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/benchmarks/gpu_day" "$@"
