#!/usr/bin/env bash
# Installs an environment for `rlvr rehearse`: install_rehearsal.sh VENV
#
# Like that of install.sh, but with a CUDA build of torch (gigabytes), which needs neither a GPU nor a driver here, and
# with Transformer Engine's Python without its libraries. Does nothing if VENV is up to date.
set -euo pipefail
venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)
torch=2.14.1
transformer_engine=2.17.0

stamp="$venv/.installed"
wanted=$(cat "$root/requirements.txt" "$root/setup.py" "$0" | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

echo "installing into $venv (gigabytes the first time)"
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet "torch==$torch"
# torch brings its own Triton, and setuptools must be there before what is built without isolation.
grep -v '^triton==' "$root/requirements.txt" >"$venv/requirements.txt"
echo "torch==$torch" >"$venv/constraints.txt"
pip install --quiet --constraint "$venv/constraints.txt" --requirement "$venv/requirements.txt"
pip install --quiet --no-deps "transformer-engine==$transformer_engine" onnxscript onnx onnx_ir ml_dtypes einops
pip install --quiet --no-deps --no-build-isolation --editable "$root"
echo "$wanted" >"$stamp"
