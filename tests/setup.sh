#!/bin/sh
# Gets what the tests need and cargo does not bring: Debian's Prometheus and libfaketime, unpacked into a cache, without being
# root.
#
# Prints shell assignments for what is there and, on stderr, why something is not.
# What is on the PATH is used as it is. TRIBUTARY_PROMETHEUS and TRIBUTARY_PROMTOOL, if set, win over both.
set -eu

cache=${TRIBUTARY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tributary}/packages

# apt with lists of its own: the system's may be empty or old, and only root may renew them.
own_apt() {
    apt-get -qq -o Dir::State::lists="$cache/apt/lists" -o Dir::Cache="$cache/apt/cache" -o Debug::NoLocking=true "$@"
}

# Downloads package $1 and unpacks it into the cache. The rename comes last, so half a package is none.
unpack() {
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo "setup: $1 is not on the PATH, and this is not Debian: install it and run again" >&2
        return 1
    fi
    work=$cache/$1.$$
    mkdir -p "$work/tree" "$cache/apt/lists/partial" "$cache/apt/cache/archives/partial"
    (cd "$work" && { apt-get -qq download "$1" 2>/dev/null || { own_apt update && own_apt download "$1"; }; }) >&2 &&
        dpkg-deb -x "$work"/*.deb "$work/tree" && rm -rf "${cache:?}/$1" && mv "$work/tree" "$cache/$1" && status=0 || status=1
    rm -rf "$work"
    return "$status"
}

# Prints NAME='path' for binary $2 of package $3, from the environment, the PATH, or the cache.
provide() {
    eval "given=\${$1-}"
    path=${given:-$(command -v "$2" || true)}
    if [ -z "$path" ]; then
        path=$cache/$3/usr/bin/$2
        [ -x "$path" ] || unpack "$3" || return 0
    fi
    "$path" --version >/dev/null 2>&1 || { echo "setup: $path does not run" >&2; return 0; }
    echo "$1='$path'"
}

provide TRIBUTARY_PROMETHEUS prometheus prometheus
provide TRIBUTARY_PROMTOOL promtool prometheus

# libfaketime, which gives one process another clock: the file itself, to be preloaded.
if [ -z "${TRIBUTARY_FAKETIME-}" ]; then
    library() { find "$@" -name libfaketime.so.1 2>/dev/null | head -n 1; }
    TRIBUTARY_FAKETIME=$(library /usr/lib/*/faketime /usr/lib/faketime "$cache/libfaketime")
    [ -n "$TRIBUTARY_FAKETIME" ] || ! unpack libfaketime || TRIBUTARY_FAKETIME=$(library "$cache/libfaketime")
fi
[ -z "$TRIBUTARY_FAKETIME" ] || echo "TRIBUTARY_FAKETIME='$TRIBUTARY_FAKETIME'"
