#!/usr/bin/env bash
# Installs the CPU environment: install.sh VENV
#
# VENV becomes a virtual environment with the pinned dependencies and this package, editable. Does nothing if VENV is up
# to date.
set -euo pipefail
venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)
torch=2.13.0

stamp="$venv/.installed"
wanted=$(cat "$root/requirements.txt" "$root/setup.py" "$0" | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
find_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}
apt_get() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "install.sh: $1 is missing; install it (Debian: apt-get install $1) and try again" >&2
        exit 1
    fi
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1" >/dev/null
}

python=$(find_python)
if [ -z "$python" ]; then
    apt_get python3
    python=$(find_python)
    [ -n "$python" ] || { echo "install.sh: Python 3.11 or newer is needed; set PYTHON to one" >&2; exit 1; }
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null || apt_get python3-venv

echo "installing into $venv (a few minutes the first time)"
rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# The steps below must keep the CPU build of torch: the default build depends on gigabytes of CUDA packages.
pip install --quiet "torch==$torch+cpu" 2>/dev/null ||
    pip install --quiet "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
    pip install --quiet "torch==$torch"
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
echo "torch==$torch" >"$files/constraints.txt"
# A build for CUDA has come with a Triton of its own.
pinned='^$'
if "$venv/bin/python" -m pip show --quiet triton 2>/dev/null; then pinned='^triton=='; fi
grep -v "$pinned" "$root/requirements.txt" >"$files/requirements.txt"
pip install --quiet --constraint "$files/constraints.txt" --requirement "$files/requirements.txt"
pip install --quiet --no-deps --no-build-isolation --editable "$root"
echo "$wanted" >"$stamp"
