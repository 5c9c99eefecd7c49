#!/usr/bin/env bash
# Program of a pod of training.yaml: runs one node of the run, and exits with a status from which Kubernetes knows
# whether the run is finished or has to continue in another pod.
#
#   examples/kubernetes/train.sh RUN_DIR CONFIG.yaml [--section.key VALUE ...]
#
# A run that gets SIGTERM (because its node is drained, for example) saves and exits with 0 on all nodes, which a Job
# would count as complete. A run is complete if it has a summary; without one the status of this script is not 0, and
# the pod is replaced.
set -uo pipefail

run_dir=$1
shift
# torchrun would fail if node 0 started more than a minute later than other nodes, for example while its image is
# pulled.
trap 'exit 143' TERM
if [ "$NODE_RANK" != 0 ]; then
    until (: >"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do sleep 2; done
fi
node= interrupted= early=
trap 'if [ "$node" ]; then interrupted=1; kill -TERM "$node" 2>/dev/null; else early=1; fi' TERM
"$(dirname "${BASH_SOURCE[0]}")/../cluster/torchrun.sh" "$@" --run.dir "$run_dir" &
node=$!
[ ! "$early" ] || kill -TERM "$node"
while wait "$node"; status=$?; [ "$interrupted" ]; do # by the signal; the second wait returns the launcher's status
    interrupted=
done
[ "$status" = 0 ] || exit "$status"
for _ in {1..60}; do # another node writes the file, and a network file system may show it late
    [ ! -f "$run_dir/summary.json" ] || exit 0
    sleep 1
done
echo "train: the run was stopped and has saved; it resumes in the pod that replaces this one" >&2
exit 143
