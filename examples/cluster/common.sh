# What all launchers of this folder share; they source it. Variables that are set beforehand win.
# shellcheck shell=bash disable=SC2034

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Of the environment that has megatron_rlvr.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON=$ROOT/.venv/bin/python
fi
export PYTHON

# Logs, and the reason why a run ended: a folder that all nodes see under this path. $1 is a name for it.
use_log_dir() {
    LOG_DIR=${LOG_DIR:-$PWD/runs/logs/$1}
    export LOG_DIR
    mkdir -p "$LOG_DIR"
}

# A line is in the log when it is printed, and not when a buffer is full.
export PYTHONUNBUFFERED=1

# The environment of ranks; servers must not inherit it. $LOG_DIR is set.
trainer_environment() {
    # Threads of a rank on the CPU. A rank on a GPU needs few; graders and servers are processes of their own.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

    # Megatron's tensor parallelism overlaps communication with products only where the GPU has one queue for both.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

    # A collective that fails, or takes longer than run.timeout_minutes, ends its process (3, torch's own choice); 0
    # would leave it waiting. run.timeout_minutes bounds every wait of a rank for another, by NCCL or by gloo.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}

    # The last collectives of each rank are written down when one of them times out: who was waiting for whom.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$LOG_DIR/nccl_trace_}

    # NCCL speaks up where something is wrong; INFO tells which network and topology it found. One file a process: what
    # 1,000 ranks say at once is of no use in one.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export NCCL_DEBUG_FILE=${NCCL_DEBUG_FILE:-$LOG_DIR/nccl_%h_%p.log}

    # Not set here, for your site to choose. The network interface, where a node has several or its name resolves to
    # 127.0.0.1 (gloo carries small messages, and all of them on a CPU; without it ranks wait for each other until
    # run.timeout_minutes is over), and InfiniBand adapters, by default all:
    #   export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5_0,mlx5_1
    # GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME hold for servers too: weights reach them by the same networks.
}

# One line on stderr, from the launcher itself.
say() { echo "$(basename "$0" .sh): $*" >&2; }

# Wrong input: one line, status 2.
refuse() {
    say "$*"
    exit 2
}

# Whole numbers only: whole NAME LEAST.
whole() {
    [[ ${!1} =~ ^[0-9]+$ ]] && ((${!1} >= $2)) || refuse "$1=${!1} is not a whole number of at least $2; correct it"
}

# About a second, or less when a signal arrives: bash runs a trap only between commands, or in `wait`. What it would say
# there of a child that was killed is said elsewhere.
nap() {
    sleep 1 &
    { wait $! || true; } 2>/dev/null
}

# Whether a child of this shell still runs.
runs() { kill -0 "$1" 2>/dev/null; }

# In front of a command: the kernel kills it when its parent is gone. Empty where setpriv is older than that can do.
dies_with_parent=()
if setpriv --pdeathsig KILL true 2>/dev/null; then
    dies_with_parent=(setpriv --pdeathsig KILL)
fi
