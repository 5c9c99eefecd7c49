# What run.sh of each model begins with; it sources this with its own arguments, MODEL (its folder) and RANKS being set.
# Sets `recipe` and `config`, leaves the flags in "$@", and with --check among them reads everything and ends.
# shellcheck shell=bash disable=SC2034,SC2154
. "$(dirname "${BASH_SOURCE[0]}")/cluster/common.sh"

[ $# -gt 0 ] || refuse "name a recipe: forking_20k, all_tokens_20k, forking_29k or all_tokens_29k"
recipe=$1 config=$ROOT/examples/$MODEL/$1.yaml
[ -f "$config" ] || refuse "$1 is no recipe; the recipes are forking_20k, all_tokens_20k, forking_29k, all_tokens_29k"
shift
if [[ " $* " == *" --check "* ]]; then
    WORLD_SIZE=$RANKS exec "$PYTHON" -m megatron_rlvr.train "$config" "$@"
fi
