#!/usr/bin/env bash
# Installs what tests/cluster needs on Debian or Ubuntu: Slurm, which runs on loopback there, and network namespaces.
# Nothing is done where all of it is there. 15 s, 45 MB. No service is started: the tests start daemons of their own.
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
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "install_cluster_packages.sh: ${missing[*]} missing, and this needs root and apt-get; install them by hand" >&2
    exit 1
fi
echo "installing ${missing[*]}"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # packages ask it whether to start their services
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
