#!/usr/bin/env bash
# Installs the packages for tests of clusters, containers and the report on Debian or Ubuntu: Slurm, which the tests run
# on loopback, the tools for network namespaces, buildah, and Chromium. Does nothing if all are installed. Starts no service: the tests start
# their own daemons.
set -euo pipefail

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
PATH=$PATH:/usr/sbin:/sbin
need slurmctld slurmctld
need slurmd slurmd
need sbatch slurm-client
need munged munge
need ip iproute2
need pgrep procps
need buildah buildah
need chromium chromium
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "install_cluster_packages.sh: ${missing[*]} missing; run this as root with apt-get, or install them by hand" >&2
    exit 1
fi
echo "installing ${missing[*]}"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # packages query this program before they start a service
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
