#!/usr/bin/env bash
# Installs a real SGLang server for tests on a machine without a GPU: install_sglang_cpu.sh VENV
#
# SGLang declares dependencies that are CUDA wheels. This script installs the CPU build of torch, SGLang without its
# declared dependencies, the packages that it imports, and stand-ins for two modules that only run on GPUs (sglang_cpu/).
# The server runs dense models:
#
#   SGLANG_USE_CPU_ENGINE=1 VENV/bin/python -m sglang.launch_server --device cpu --attention-backend torch_native \
#       --max-total-tokens 16384 --model-path FOLDER --host 127.0.0.1 --port PORT
#
# Does nothing if VENV is up to date. Takes two minutes and 2.7 GB of disk.
set -euo pipefail
venv=${1:?usage: install_sglang_cpu.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
torch=2.13.0 torchvision=0.28.0

stamp="$venv/.installed"
wanted=$(cat "$here/sglang.txt" "$here"/sglang_cpu/*.txt "$here"/sglang_cpu/*.py "$0" | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

python=
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "install_sglang_cpu.sh: Python 3.11 or newer with venv is needed; set PYTHON to one" >&2
    exit 1
fi

echo "installing the SGLang server into $venv (two minutes the first time)"
rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet "torch==$torch+cpu" 2>/dev/null ||
    pip install --quiet "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
pip install --quiet --no-deps --requirement "$here/sglang_cpu/requirements.txt"
# Any build of torchvision works: the operators of its CUDA code are declared below, and never called.
pip install --quiet --no-deps "torchvision==$torchvision"

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/sgl_kernel"
cp "$here/sglang_cpu/sgl_kernel.py" "$site/sgl_kernel/__init__.py"
patched=$(mktemp)
trap 'rm -f "$patched"' EXIT
cat "$here/sglang_cpu/torchvision_operators.py" "$site/torchvision/__init__.py" >"$patched"
cat "$patched" >"$site/torchvision/__init__.py"

SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -W ignore -c 'import sglang.launch_server, sglang.srt.entrypoints.http_server'
echo "$wanted" >"$stamp"
