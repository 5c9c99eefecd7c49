#!/usr/bin/env bash
# What a pod of training.yaml runs: one node of the run, with a status by which Kubernetes tells a finished run from one
# that goes on elsewhere.
#
#   examples/kubernetes/train.sh RUN_DIR CONFIG.yaml [--section.key VALUE ...]
#
# A run that was asked to stop (SIGTERM: its node is drained, say) saves and ends with 0 on all nodes; a Job would take
# that for complete. Complete is what has a summary; for anything else the status here is not 0, and the pod is replaced.
set -uo pipefail

run_dir=$1
shift
# Where node 0 comes later than others (its image is pulled, say), they would give it a minute, and fail.
trap 'exit 143' TERM
if [ "$NODE_RANK" != 0 ]; then
    until (: >"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do sleep 2; done
fi
node= asked= early=
trap 'if [ "$node" ]; then asked=1; kill -TERM "$node" 2>/dev/null; else early=1; fi' TERM
"$(dirname "${BASH_SOURCE[0]}")/../cluster/torchrun.sh" "$@" --run.dir "$run_dir" &
node=$!
[ ! "$early" ] || kill -TERM "$node"
while wait "$node"; status=$?; [ "$asked" ]; do # the signal interrupted it; a second wait has the launcher's own status
    asked=
done
[ "$status" = 0 ] || exit "$status"
for _ in {1..60}; do # another node writes it, and a network file system may show it late
    [ ! -f "$run_dir/summary.json" ] || exit 0
    sleep 1
done
echo "train: the run was stopped and has saved; it goes on in the pod that replaces this one" >&2
exit 143
