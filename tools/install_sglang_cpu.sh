#!/usr/bin/env bash
# Installs a real SGLang server for tests on a machine without a GPU: install_sglang_cpu.sh VENV
#
# SGLang's own dependencies are CUDA wheels. Here it gets the CPU build of torch, the packages that it imports, itself
# without dependencies, and stand-ins for two things that only GPUs run (sglang_cpu/). It serves dense models with
#
#   SGLANG_USE_CPU_ENGINE=1 VENV/bin/python -m sglang.launch_server --device cpu --attention-backend torch_native \
#       --max-total-tokens 16384 --model-path FOLDER --host 127.0.0.1 --port PORT
#
# Nothing is done when VENV is up to date. Takes two minutes and 2.7 GB.
set -euo pipefail
venv=${1:?usage: install_sglang_cpu.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
torch=2.13.0 torchvision=0.28.0 sglang=0.5.23

stamp="$venv/.installed"
wanted=$(cat "$here"/sglang_cpu/*.txt "$here"/sglang_cpu/*.py "$0" | cksum)
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
[ -n "$python" ] || { echo "install_sglang_cpu.sh: Python 3.11 or newer with venv is needed; set PYTHON to one" >&2; exit 1; }

echo "installing the SGLang server into $venv (two minutes the first time)"
rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet "torch==$torch+cpu" 2>/dev/null ||
    pip install --quiet "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
pip install --quiet --no-deps --requirement "$here/sglang_cpu/requirements.txt"
# Any torchvision on the index will do: what its CUDA code would define is declared below, and never called.
pip install --quiet --no-deps "torchvision==$torchvision" "sglang==$sglang"

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/sgl_kernel"
cp "$here/sglang_cpu/sgl_kernel.py" "$site/sgl_kernel/__init__.py"
whole=$(mktemp)
trap 'rm -f "$whole"' EXIT
cat "$here/sglang_cpu/torchvision_operators.py" "$site/torchvision/__init__.py" >"$whole"
cat "$whole" >"$site/torchvision/__init__.py"

SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -W ignore -c 'import sglang.launch_server, sglang.srt.entrypoints.http_server'
echo "$wanted" >"$stamp"
