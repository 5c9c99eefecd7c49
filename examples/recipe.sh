# Common part of each model's run.sh, which sources this file with its own arguments after setting MODEL (its folder)
# and RANKS. Sets `recipe` and `config`, and leaves the flags in "$@". With --check among the flags, it checks the
# settings and files and exits.
# shellcheck shell=bash disable=SC2034,SC2154
. "$(dirname "${BASH_SOURCE[0]}")/cluster/common.sh"

[ $# -gt 0 ] || refuse "name a recipe: forking_20k, all_tokens_20k, forking_29k or all_tokens_29k"
recipe=$1 config=$ROOT/examples/$MODEL/$1.yaml
[ -f "$config" ] || refuse "$1 is no recipe; the recipes are forking_20k, all_tokens_20k, forking_29k, all_tokens_29k"
shift
if [[ " $* " == *" --check "* ]]; then
    WORLD_SIZE=$RANKS exec "$PYTHON" -m megatron_rlvr.train "$config" "$@"
fi
