#!/usr/bin/env bash
# Unpacks a release of megatron-core into a folder for PYTHONPATH: install_core.sh PYTHON VERSION FOLDER
#
# The release may declare a newer Python than PYTHON. Only the compiled helper of its data sets then cannot be imported,
# which nothing here uses. Does nothing if the folder is complete.
set -euo pipefail
python=${1:?usage: install_core.sh PYTHON VERSION FOLDER} version=$2 folder=$3

if [ -d "$folder/megatron_core-$version.dist-info" ]; then
    exit 0
fi
mkdir -p "$folder"
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
"$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --python-version 3.12 \
    --dest "$download" "megatron-core==$version"
"$python" -m zipfile --extract "$download"/*.whl "$folder"
