#!/usr/bin/env bash
# Builds the Dockerfile's CPU variant without a container engine, and runs the project's tests in it.
#
#   tests/container.sh                          build, then `make test` in the container: lint, type check and all tests
#   tests/container.sh --tests "tests/algo -x"  build, then pytest with these arguments
#
#   --base IMAGE       build on this image instead of a Debian that debootstrap creates
#   --mirror URL       mirror for that Debian; by default the one from which this machine installs
#   --storage FOLDER   keep images in FOLDER, and use a base image that it contains; by default no image is kept
#
# Packages are installed from the sources of this machine: pip's settings, the certificates and local indexes that they
# name, and apt's proxies are mounted into the build. Each of these files contains a random mark, by which the program
# checks that no layer contains it. Needs root, 30 GB of disk, and Debian's buildah and debootstrap, which it installs.
# Stops at the first failure.
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
        *) die "$1 is an unknown flag; see --help" 2 ;;
    esac
done

[ "$(id -u)" = 0 ] || die "debootstrap and chroot need root; run it as root" 2
missing=()
for program in buildah debootstrap; do command -v "$program" >/dev/null || missing+=("$program"); done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || die "${missing[*]} missing; install the packages of this name" 2
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

step() { # step NAME COMMAND ...: runs the command, and prints how long it took
    current=$1 started=$SECONDS
    shift
    echo "== $current"
    "$@" # not in a condition, in which bash would continue after a failure inside the function
    echo "== $current: done in $((SECONDS - started)) s"
    current=''
}

make_base() { # creates image $1: a Debian with its package manager only
    local container folder site
    site=${mirror:-$(apt-get indextargets --format '$(SITE)' "Codename: $debian" 2>/dev/null | head -1)}
    container=$(buildah from scratch)
    folder=$(buildah mount "$container")
    debootstrap --variant=minbase --include=ca-certificates "$debian" "$folder" \
        "${site:-http://deb.debian.org/debian}" \
        >"$work/debootstrap.log" 2>&1 || { tail -20 "$work/debootstrap.log" >&2; return 1; }
    buildah commit --quiet --rm "$container" "$1" >/dev/null
}

pip_settings() { # prints pip's settings on this machine as one file; environment variables take precedence over files
    printf '[global]\n'
    python3 -m pip config list 2>/dev/null |
        sed -n "s/^\(:env:\|global\|install\)\.\([a-z-]*\)='\(.*\)'$/\2 = \3/p" | awk '!seen[$1]++'
}

local_indexes() { # prints the folders on this disk that pip's settings in file $1 name; for an index, its parent folder
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

keeps_no_secret() { # succeeds if no file of any layer, and no settings or history of any image, contain the mark
    local found
    found=$(LC_ALL=C grep --recursive --files-with-matches --fixed-strings --devices=skip "$1" "$images" || true)
    [ -z "$found" ] || { echo "a file that was mounted into the build is in: $found"; return 1; }
}

run_tests() {
    local container files
    files=$(ulimit -H -n) # the default in a container is 1024 open files, which one set of ranks exceeds
    container=$(buildah from --ulimit "nofile=$files:$files" "$image")
    # The host name must be one that the container can resolve: torchrun's ranks connect to the name of their machine.
    # Signals are as on a terminal: a shell that runs this program in the background ignores some, which processes
    # started by the tests would inherit.
    buildah run --isolation chroot --hostname localhost "$container" -- env --default-signal=HUP,INT \
        sh -c "${tests:+OMP_NUM_THREADS=1 python -m pytest -q }${tests:-make test}"
}

if [ -z "$base" ]; then
    base=localhost/debian:$debian
    buildah inspect --type image "$base" >/dev/null 2>&1 || step "base image" make_base "$base"
fi
mark="mark-$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')"
step "build" build "$mark"
step "no layer contains the mounted files" keeps_no_secret "$mark"
step "tests in the container" run_tests
