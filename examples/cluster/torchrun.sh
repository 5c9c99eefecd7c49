#!/usr/bin/env bash
# Runs one node of a run: starts torchrun, forwards signals to the ranks, and prints in one line why the node ended.
#
#   examples/cluster/torchrun.sh CONFIG.yaml [--section.key VALUE ...]                        one node of 8 GPUs
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node1 examples/cluster/torchrun.sh CONFIG.yaml [...]      on node1, and
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node1 examples/cluster/torchrun.sh CONFIG.yaml [...]      on node2, in any order
#
# Environment variables (defaults in parentheses):
#
#   NODES          number of nodes of the run (1)
#   NODE_RANK      number of this node, 0 to NODES - 1 (0)
#   GPUS_PER_NODE  number of ranks on each node (8)
#   MASTER_ADDR    address of node 0, to which all nodes connect; required if NODES > 1
#   MASTER_PORT    port on node 0 (29500)
#   MAX_RESTARTS   how many times all ranks are restarted, from the last checkpoint, after one has failed (0)
#   EXIT_SECONDS   how many seconds torchrun may keep running after its ranks have exited (120). It waits for the other
#                  nodes, which never answer if the network is down. Ignored with MAX_RESTARTS, when ranks may restart
#   LOCAL_ADDR     address of this node, if the other nodes cannot resolve its host name
#   LOG_DIR        folder for node_K.log and, after a failure, node_K.reason (runs/logs/NAME for NAME.yaml)
#   PREFLIGHT      1 runs tools/preflight.py in place of the run, on the same ranks, servers and settings; another value
#                  is passed to it as flags, such as "--only servers mismatch"
#   PYTHON         Python that has megatron_rlvr (.venv/bin/python, else python3)
#
# common.sh lists the other variables.
#
# After SIGTERM or SIGUSR1 the ranks finish their training step, save, and exit with status 0. A step that takes longer
# than run.grace_seconds is abandoned. (torchrun by itself would kill the ranks after 30 s.) After SIGINT or SIGHUP they
# stop at once. In a restart the ranks are numbered again, in the order of their nodes' names, not of NODE_RANK.
#
# A node that fails writes its reason to LOG_DIR, and the other nodes exit when they see it there: their ranks may be
# waiting on the network for a rank that has exited, which NCCL detects only after run.timeout_minutes.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -gt 0 ] || refuse "give CONFIG.yaml; flags such as --run.steps 10 may follow"
NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-0} GPUS_PER_NODE=${GPUS_PER_NODE:-8} MAX_RESTARTS=${MAX_RESTARTS:-0}
check_int NODES 1
check_int NODE_RANK 0
check_int GPUS_PER_NODE 1
check_int MAX_RESTARTS 0
EXIT_SECONDS=${EXIT_SECONDS:-120}
check_int EXIT_SECONDS 0
((NODE_RANK < NODES)) || refuse "NODE_RANK=$NODE_RANK: not below NODES=$NODES; count nodes from 0"
use_log_dir "$(basename "$1" .yaml)"
trainer_environment

program=(-m megatron_rlvr.train "$@")
if [ "${PREFLIGHT:-0}" != 0 ]; then
    MAX_RESTARTS=0 # a failed check would fail again
    read -r -a preflight_flags <<<"${PREFLIGHT#1}"
    program=("$ROOT/tools/preflight.py" "$@" "${preflight_flags[@]}")
fi
launch=(--nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS")
if ((NODES == 1)); then
    launch+=(--standalone --local-addr "${LOCAL_ADDR:-127.0.0.1}") # the host's own name may not resolve
else
    [ -n "${MASTER_ADDR:-}" ] || refuse "NODES=$NODES needs MASTER_ADDR, the address of node 0; set it on every node"
    # c10d: node 0 has a store, through which all nodes agree on the participating nodes and on restarts.
    launch+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
    launch+=(--rdzv-id "${RUN_ID:-megatron_rlvr}" --rdzv-conf "is_host=$((NODE_RANK == 0))")
    [ -z "${LOCAL_ADDR:-}" ] || launch+=(--local-addr "$LOCAL_ADDR")
fi
ranks=("${dies_with_parent[@]}" "$PYTHON" "${program[@]}")

log=$LOG_DIR/node_$NODE_RANK.log
reason=$LOG_DIR/node_$NODE_RANK.reason
started=$LOG_DIR/node_$NODE_RANK.started
touch "$log" "$started"
rm -f "$reason"
first_line=$(($(wc -l <"$log") + 1))

stop=
trap 'stop=SIGTERM' TERM USR1
trap 'stop=SIGINT' INT HUP
exec 3> >(trap '' TERM USR1 INT HUP && exec tee -a "$log")
tee=$!
# In a session of its own: a signal to this script's process group must not reach torchrun, which would kill the ranks
# after 30 s.
setsid "${dies_with_parent[@]}" "$PYTHON" -m torch.distributed.run "${launch[@]}" --no-python "${ranks[@]}" \
    >&3 2>&3 3>&- </dev/null &
agent=$!

# Sets `ranks` to torchrun's running children; one that has exited remains a zombie until torchrun polls. A signal to
# this script's process group kills the commands that it runs, so this function reads /proc without running any.
find_ranks() {
    local child children=() state
    ranks=()
    {
        read -r -a children <"/proc/$agent/task/$agent/children" || true
        for child in "${children[@]}"; do
            read -r state <"/proc/$child/stat" || true
            [[ $state == *") Z "* ]] || ranks+=("$child")
        done
    } 2>/dev/null
}

# Sends SIGTERM to each rank once, and to the ranks of a restart. If there is no rank, there is nothing to save.
signalled=
ask_ranks_to_save() {
    local rank
    for rank in "${ranks[@]}"; do
        [[ " $signalled " == *" $rank "* ]] || kill -TERM "$rank" 2>/dev/null || true
        signalled+=" $rank"
    done
    [ -n "$signalled" ] || kill_all
}

# Kills torchrun before its ranks, because otherwise it would restart them.
kill_all() { kill -KILL "$agent" "${ranks[@]}" 2>/dev/null || true; }

# Sets `other_reason` to the reason of another node that has failed since this node started.
check_other_nodes() {
    local file
    for file in "$LOG_DIR"/node_*.reason; do
        if [ "$file" != "$reason" ] && [ "$file" -nt "$started" ]; then
            read -r other_reason <"$file"
            return
        fi
    done
}

other_reason=
patience=10 # seconds for the ranks to exit after SIGINT
had_ranks= alone=0 # `alone`: seconds for which torchrun has run without ranks
while runs "$agent"; do
    nap
    find_ranks
    if [ "$stop" = SIGTERM ]; then
        ask_ranks_to_save
    elif [ "$stop" = SIGINT ]; then
        kill -INT "$agent" 2>/dev/null || true
        ((patience--)) || kill_all
    fi
    check_other_nodes
    if ((${#ranks[@]})); then
        had_ranks=yes alone=0
    elif [ -n "$had_ranks" ]; then
        ((++alone))
    fi
    if [ -n "$other_reason" ] || ((MAX_RESTARTS == 0 && alone > EXIT_SECONDS)); then
        kill_all
    fi
done
trap '' TERM USR1 INT HUP
status=0
wait "$agent" || status=$?
exec 3>&-
for _ in {1..50}; do # processes that ranks have left may keep the pipe open
    runs "$tee" || break
    sleep 0.1
done

# Prints why the node ended: the trainer's own message, or torchrun's report of the first rank that failed with its
# error.
why() {
    local output message cause rank code error
    output=$(tail -n "+$first_line" "$log")
    message=$(grep -m1 '^megatron_rlvr: ' <<<"$output" || true)
    if [ -n "$message" ]; then
        echo "${message#megatron_rlvr: }"
        return
    fi
    cause=$(sed -n '/^Root Cause/,$p' <<<"$output")
    rank=$(sed -n 's/^ *rank *: *\([0-9]*\).*/\1/p' <<<"$cause" | head -n 1)
    code=$(sed -n 's/^ *exitcode *: *\(-\{0,1\}[0-9]*\).*/\1/p' <<<"$cause" | head -n 1)
    error=$(grep -E '^[A-Za-z_][A-Za-z_.0-9]*(Error|Exception)(:|$)' <<<"$output" | grep -v ChildFailedError |
        head -n 1)
    if [ -z "$rank" ]; then
        echo "${error:-torchrun exited with status $status; see $log}"
    elif ((code < 0)); then
        echo "rank $rank was killed by signal $((-code))"
    else
        echo "rank $rank exited with status $code: ${error:-see $log}"
    fi
}

name="node $NODE_RANK of $NODES ($(hostname))"
if ((status == 0)); then
    exit 0
elif [ -n "$other_reason" ]; then
    say "$name was stopped because another node failed: $other_reason"
    exit 1
fi
because=$(why || true)
unsaved='^rank [0-9]+ (exited with status 143|was killed by signal 15)'
if [ "$stop" = SIGINT ] || { [ "$stop" = SIGTERM ] && [[ -z $signalled || $because =~ $unsaved ]]; }; then
    say "$name was stopped by $stop with no step to finish; run the same command to resume from the last checkpoint"
    if [ "$stop" = SIGTERM ]; then exit 143; else exit 130; fi
fi
echo "$name failed after $SECONDS s: $because" | cut -c -500 >"$reason.new"
mv "$reason.new" "$reason"
say "$(cat "$reason")"
exit "$status"
