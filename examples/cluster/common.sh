# Functions and environment variables for all launchers in this folder, which source this file. Variables that are
# already set keep their values.
# shellcheck shell=bash disable=SC2034

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# PYTHON: the Python that has megatron_rlvr.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON=$ROOT/.venv/bin/python
fi
export PYTHON

# Sets and creates LOG_DIR, the folder for logs and for the reason why a run ended. All nodes must see it under the same
# path. $1 is the default name of the folder.
use_log_dir() {
    LOG_DIR=${LOG_DIR:-$PWD/runs/logs/$1}
    export LOG_DIR
    mkdir -p "$LOG_DIR"
}

# Without buffering, so that a line is in the log as soon as it is printed.
export PYTHONUNBUFFERED=1

# Sets the environment of the ranks, which servers must not inherit. Requires LOG_DIR.
trainer_environment() {
    # The trainer itself sets what does not depend on LOG_DIR (megatron_rlvr/distributed/environment.py).

    # When a collective times out, each rank writes a trace of its last collectives, which shows the missing rank.
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$LOG_DIR/nccl_trace_}

    # NCCL logs warnings; with INFO it also logs the networks and the topology that it uses. One file per process,
    # because the interleaved output of 1,000 ranks is unreadable.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export NCCL_DEBUG_FILE=${NCCL_DEBUG_FILE:-$LOG_DIR/nccl_%h_%p.log}

    # Depends on your site and is not set here: the InfiniBand adapters (by default all), and the network interface.
    # Without one, gloo uses the interface on the way to MASTER_ADDR, and a server's the one of its --host; set it if a
    # node has several and another is faster. Gloo sends small messages, and on a CPU all messages. NCCL leaves out
    # loopback, and prefers InfiniBand.
    #   export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5_0,mlx5_1
    # Servers need GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME too, because weights are pushed over the same networks.
}

# say MESSAGE: prints one line on stderr, prefixed by the name of the launcher.
say() { echo "$(basename "$0" .sh): $*" >&2; }

# refuse MESSAGE: prints one line about wrong input and exits with status 2.
refuse() {
    say "$*"
    exit 2
}

# check_int NAME MINIMUM: refuses the variable NAME unless it is an int of at least MINIMUM.
check_int() {
    [[ ${!1} =~ ^[0-9]+$ ]] && ((${!1} >= $2)) || refuse "$1=${!1}: not an int of at least $2; correct it"
}

# Sleeps for a second, or until a signal arrives: bash runs a trap only between commands, or during `wait`. The message
# that bash prints here about a killed child is dropped, because the launchers report it.
nap() {
    sleep 1 &
    { wait $! || true; } 2>/dev/null
}

# runs PID: succeeds if this child of the shell has not exited.
runs() { kill -0 "$1" 2>/dev/null; }

# Prefix of a command that the kernel kills when its parent exits. Empty if setpriv is too old to support it.
dies_with_parent=()
if setpriv --pdeathsig KILL true 2>/dev/null; then
    dies_with_parent=(setpriv --pdeathsig KILL)
fi
