#!/usr/bin/env bash
# One node of a run: starts torchrun, hands signals on to the ranks, and says in one line why it ended.
#
#   examples/cluster/torchrun.sh CONFIG.yaml [--section.key VALUE ...]                        one node of 8 GPUs
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node1 examples/cluster/torchrun.sh CONFIG.yaml [...]      on node1, and
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node1 examples/cluster/torchrun.sh CONFIG.yaml [...]      on node2, in any order
#
#   NODES          of the run (1)
#   NODE_RANK      of this node, 0 to NODES - 1 (0)
#   GPUS_PER_NODE  ranks on each node (8)
#   MASTER_ADDR    of node 0, where the nodes find each other; needed if NODES > 1
#   MASTER_PORT    there (29500)
#   MAX_RESTARTS   how often all ranks are started again, from the last checkpoint, when one has failed (0)
#   EXIT_SECONDS   how long torchrun may stay when its ranks are gone (120): it waits for the other nodes, or, out of
#                  their reach, for nothing. Not with MAX_RESTARTS, where the ranks may come again
#   LOCAL_ADDR     of this node, for the others, where its own name is none that they know
#   LOG_DIR        (runs/logs/NAME of CONFIG.yaml) holds node_K.log and, after a failure, node_K.reason
#   PREFLIGHT      1: tools/preflight.py in place of the run, on the same ranks, servers and settings; or its flags, such
#                  as "--only servers gap"
#   PYTHON         (.venv/bin/python, else python3); common.sh lists what else can be set
#
# SIGTERM and SIGUSR1: the ranks save what there is, training after its step, or give the step up after
# run.grace_seconds; the status is 0. torchrun itself would kill them after 30 s. SIGINT, SIGHUP: they end at once. Ranks find each other anew in a restart, and the numbers that they get
# follow the names of their nodes, not NODE_RANK.
#
# A node that fails leaves its reason in LOG_DIR, and the other nodes end when they see it there: their ranks may be
# waiting on the network for one that is gone, which NCCL notices after run.timeout_minutes.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -gt 0 ] || refuse "give CONFIG.yaml; flags such as --run.steps 10 may follow"
NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-0} GPUS_PER_NODE=${GPUS_PER_NODE:-8} MAX_RESTARTS=${MAX_RESTARTS:-0}
whole NODES 1
whole NODE_RANK 0
whole GPUS_PER_NODE 1
whole MAX_RESTARTS 0
EXIT_SECONDS=${EXIT_SECONDS:-120}
whole EXIT_SECONDS 0
((NODE_RANK < NODES)) || refuse "NODE_RANK=$NODE_RANK is not below NODES=$NODES; nodes are counted from 0"
use_log_dir "$(basename "$1" .yaml)"
trainer_environment

program=(-m megatron_rlvr.train "$@")
if [ "${PREFLIGHT:-0}" != 0 ]; then
    MAX_RESTARTS=0 # what is red stays so
    read -r -a own <<<"${PREFLIGHT#1}"
    program=("$ROOT/tools/preflight.py" "$@" "${own[@]}")
fi
launch=(--nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS")
if ((NODES == 1)); then
    launch+=(--standalone)
else
    [ -n "${MASTER_ADDR:-}" ] || refuse "NODES=$NODES needs MASTER_ADDR, the address of node 0; set it on every node"
    # c10d: node 0 keeps a store, through which all nodes agree on who takes part, and on each restart.
    launch+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
    launch+=(--rdzv-id "${RUN_ID:-megatron_rlvr}" --rdzv-conf "is_host=$((NODE_RANK == 0))")
    [ -z "${LOCAL_ADDR:-}" ] || launch+=(--local-addr "$LOCAL_ADDR")
fi
ranks=("${dies_with_parent[@]}" "$PYTHON" "${program[@]}")

log=$LOG_DIR/node_$NODE_RANK.log
reason=$LOG_DIR/node_$NODE_RANK.reason
began=$LOG_DIR/node_$NODE_RANK.began
touch "$log" "$began"
rm -f "$reason"
first_line=$(($(wc -l <"$log") + 1))

stop=
trap 'stop=SIGTERM' TERM USR1
trap 'stop=SIGINT' INT HUP
exec 3> >(trap '' TERM USR1 INT HUP && exec tee -a "$log")
tee=$!
# In a session of its own: a signal to this script's group must not reach torchrun, which would give its ranks 30 s.
setsid "${dies_with_parent[@]}" "$PYTHON" -m torch.distributed.run "${launch[@]}" --no-python "${ranks[@]}" \
    >&3 2>&3 3>&- </dev/null &
agent=$!

# Sets `ranks`: torchrun's children that run; one that has ended stays there until torchrun looks. A signal to this
# script's group ends what it has started, so that nothing in this loop relies on a process.
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

# SIGTERM to each rank once, and to those that a restart brings. Where there is none, nothing is there to be saved.
told=
ask_ranks_to_save() {
    local rank
    for rank in "${ranks[@]}"; do
        [[ " $told " == *" $rank "* ]] || kill -TERM "$rank" 2>/dev/null || true
        told+=" $rank"
    done
    [ -n "$told" ] || end_at_once
}

# torchrun goes before its ranks, or it would start them again.
end_at_once() { kill -KILL "$agent" "${ranks[@]}" 2>/dev/null || true; }

# Sets `elsewhere` to the reason of another node that has failed since this one began.
look_elsewhere() {
    local file
    for file in "$LOG_DIR"/node_*.reason; do
        if [ "$file" != "$reason" ] && [ "$file" -nt "$began" ]; then
            read -r elsewhere <"$file"
            return
        fi
    done
}

elsewhere=
patience=10 # seconds for the ranks to end after SIGINT
begun= alone=0
while runs "$agent"; do
    nap
    find_ranks
    if [ "$stop" = SIGTERM ]; then
        ask_ranks_to_save
    elif [ "$stop" = SIGINT ]; then
        kill -INT "$agent" 2>/dev/null || true
        ((patience--)) || end_at_once
    fi
    look_elsewhere
    if ((${#ranks[@]})); then
        begun=yes alone=0
    elif [ -n "$begun" ]; then
        ((++alone))
    fi
    if [ -n "$elsewhere" ] || ((MAX_RESTARTS == 0 && alone > EXIT_SECONDS)); then
        end_at_once
    fi
done
trap '' TERM USR1 INT HUP
status=0
wait "$agent" || status=$?
exec 3>&-
for _ in {1..50}; do # what ranks have left behind may hold the pipe open
    runs "$tee" || break
    sleep 0.1
done

# Why it ended: the trainer's own sentence, or what torchrun says of the first rank that failed and that rank's error.
why() {
    local said sentence cause rank code error
    said=$(tail -n "+$first_line" "$log")
    sentence=$(grep -m1 '^megatron_rlvr: ' <<<"$said" || true)
    if [ -n "$sentence" ]; then
        echo "${sentence#megatron_rlvr: }"
        return
    fi
    cause=$(sed -n '/^Root Cause/,$p' <<<"$said")
    rank=$(sed -n 's/^ *rank *: *\([0-9]*\).*/\1/p' <<<"$cause" | head -n 1)
    code=$(sed -n 's/^ *exitcode *: *\(-\{0,1\}[0-9]*\).*/\1/p' <<<"$cause" | head -n 1)
    error=$(grep -E '^[A-Za-z_][A-Za-z_.0-9]*(Error|Exception)(:|$)' <<<"$said" | grep -v ChildFailedError | head -n 1)
    if [ -z "$rank" ]; then
        echo "${error:-torchrun ended with status $status; see $log}"
    elif ((code < 0)); then
        echo "rank $rank was killed by signal $((-code))"
    else
        echo "rank $rank ended with status $code: ${error:-see $log}"
    fi
}

name="node $NODE_RANK of $NODES ($(hostname))"
if ((status == 0)); then
    exit 0
elif [ -n "$elsewhere" ]; then
    say "$name ends because another one has failed: $elsewhere"
    exit 1
fi
because=$(why || true)
unsaved='^rank [0-9]+ (ended with status 143|was killed by signal 15)'
if [ "$stop" = SIGINT ] || { [ "$stop" = SIGTERM ] && [[ -z $told || $because =~ $unsaved ]]; }; then
    say "$name was stopped by $stop with no step to finish; the same command goes on from the last checkpoint"
    if [ "$stop" = SIGTERM ]; then exit 143; else exit 130; fi
fi
echo "$name failed after $SECONDS s: $because" | cut -c -500 >"$reason.new"
mv "$reason.new" "$reason"
say "$(cat "$reason")"
exit "$status"
