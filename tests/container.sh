#!/usr/bin/env bash
# Builds the Dockerfile's CPU variant without a container engine, and runs the project's tests in it.
#
#   tests/container.sh                          build, then `make test` in the container: lint, type check and all tests
#   tests/container.sh --tests "tests/algo -x"  build, then pytest with these arguments
#
#   --base IMAGE       build on this image, not on a Debian that debootstrap makes
#   --mirror URL       of that Debian; by default the one that this machine installs from
#   --storage FOLDER   keep images in FOLDER (a base that is there already is used); by default nothing stays
#
# Packages come from where this machine gets them: pip's settings, the certificates and local indexes that they name,
# and apt's proxies are mounted into the build, and a mark in each proves that no layer has kept it.
# Needs root, 30 GB of disk, and Debian's buildah and debootstrap, which it installs. Ends at the first failure.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly image=localhost/megatron_rlvr:cpu debian=bookworm gigabytes=30

die() { echo "container.sh: $1" >&2; exit "${2:-1}"; }

base='' mirror='' storage='' tests=''
while [ $# -gt 0 ]; do
    case $1 in
        --help) sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"; exit ;;
        --base | --mirror | --storage | --tests)
            [ -n "${2:-}" ] || die "$1 needs a value; see --help" 2
            declare "${1#--}=$2"; shift 2 ;;
        *) die "$1 is no flag of this program; see --help" 2 ;;
    esac
done

[ "$(id -u)" = 0 ] || die "debootstrap and chroot need root; run it as root" 2
missing=()
for program in buildah debootstrap; do command -v "$program" >/dev/null || missing+=("$program"); done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || die "${missing[*]} missing; install what has this name on your system" 2
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi

work=$(mktemp -d)
images=${storage:-$work/images}
mkdir -p "$images" "$work/run"
buildah() { command buildah --root "$images" --runroot "$work/run" --storage-driver vfs "$@"; }
current='' started=0
clean() {
    local status=$?
    [ -z "$current" ] || echo "container.sh: $current: failed after $((SECONDS - started)) s" >&2
    buildah rm --all >/dev/null 2>&1 || true
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap clean EXIT
free=$(df --output=avail -BG "$images" | tail -1 | tr -dc 0-9)
[ "$free" -ge "$gigabytes" ] || die "$images has $free GB free and needs $gigabytes; name a larger disk by --storage"

step() { # step NAME COMMAND ...: runs it, and says how long it took
    current=$1 started=$SECONDS
    shift
    echo "== $current"
    "$@" # not in a condition, where bash would go on after a failure inside
    echo "== $current: done in $((SECONDS - started)) s"
    current=''
}

make_base() { # a Debian with nothing but its own package manager
    local container folder site
    site=${mirror:-$(apt-get indextargets --format '$(SITE)' "Codename: $debian" 2>/dev/null | head -1)}
    container=$(buildah from scratch)
    folder=$(buildah mount "$container")
    debootstrap --variant=minbase --include=ca-certificates "$debian" "$folder" \
        "${site:-http://deb.debian.org/debian}" \
        >"$work/debootstrap.log" 2>&1 || { tail -20 "$work/debootstrap.log" >&2; return 1; }
    buildah commit --quiet --rm "$container" "$1" >/dev/null
}

pip_settings() { # pip's settings on this machine, environment variables before files, as one file
    printf '[global]\n'
    python3 -m pip config list 2>/dev/null |
        sed -n "s/^\(:env:\|global\|install\)\.\([a-z-]*\)='\(.*\)'$/\2 = \3/p" | awk '!seen[$1]++'
}

local_indexes() { # folders on this disk that pip's settings in file $1 name; an index links to what lies beside it
    sed -n 's/^\(index-url\|extra-index-url\|find-links\) = //p' "$1" | tr ' ' '\n' |
        sed -n 's#^\(file://\)\{0,1\}\(/.*\)#\2#p' | sed 's#/simple/*$##' | sort -u
}

build() {
    local mark=$1 folder certificates flags=()
    pip_settings >"$work/pip"
    for folder in $(local_indexes "$work/pip"); do flags+=(--volume "$folder:$folder:ro"); done
    certificates=$(sed -n 's/^cert = //p' "$work/pip")
    cat "${certificates:-${REQUESTS_CA_BUNDLE:-${SSL_CERT_FILE:-/dev/null}}}" >"$work/ca"
    sed -i '/^cert = /d' "$work/pip"
    [ ! -s "$work/ca" ] || echo 'cert = /run/secrets/ca' >>"$work/pip"
    apt-config dump Acquire::http::Proxy Acquire::https::Proxy >"$work/apt" 2>/dev/null || true
    echo "# $mark" | tee -a "$work/pip" "$work/ca" "$work/apt" >/dev/null
    buildah bud --isolation chroot --tag "$image" --file Dockerfile "${flags[@]}" \
        --secret "id=pip,src=$work/pip" --secret "id=ca,src=$work/ca" --secret "id=apt,src=$work/apt" \
        --build-arg "FTP_PROXY=http://$mark.invalid" \
        --build-arg VARIANT=cpu --build-arg "BASE_IMAGE=$base" \
        --build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' megatron_rlvr/__init__.py)" \
        --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" .
}

keeps_no_secret() { # neither the files of any layer nor the settings and history of any image hold the mark
    local found
    found=$(LC_ALL=C grep --recursive --files-with-matches --fixed-strings --devices=skip "$1" "$images" || true)
    [ -z "$found" ] || { echo "what was passed to the build is in: $found"; return 1; }
}

run_tests() {
    local container files
    files=$(ulimit -H -n) # of itself a container gets 1024, which a set of ranks uses up
    container=$(buildah from --ulimit "nofile=$files:$files" "$image")
    # A name that the container can resolve: torchrun's ranks meet at the name of their machine. And signals as they are
    # on a terminal: whoever runs this program in the background ignores some, and so would what the tests start.
    buildah run --isolation chroot --hostname localhost "$container" -- env --default-signal=HUP,INT \
        sh -c "${tests:+OMP_NUM_THREADS=1 python -m pytest -q }${tests:-make test}"
}

if [ -z "$base" ]; then
    base=localhost/debian:$debian
    buildah inspect --type image "$base" >/dev/null 2>&1 || step "a Debian to build on" make_base "$base"
fi
mark="mark-$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')"
step "build" build "$mark"
step "no layer keeps what the build was given" keeps_no_secret "$mark"
step "tests in the container" run_tests
