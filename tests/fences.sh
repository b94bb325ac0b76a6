#!/bin/sh
# The fences between the crates: what each may depend on, and what `protocol` may call.
#
# What is in a tree is read from its list of names: `cargo tree -i NAME` prints nothing, too, for a name that is misspelt
# and for one that the lock file has in two versions. Every name that must be absent in one place is first shown
# to be present in another.
set -eu
cd "$(dirname "$0")/.."

failed=0
fail() {
    echo "fences: $*" >&2
    failed=1
}

# The names of all packages that package $1 is built from.
names() {
    cargo tree --locked -p "$1" -e normal --prefix none --format '{p}' | cut -d ' ' -f 1 | sort -u
}

present() {
    names "$1" | grep -qx "$2" || fail "control: $2 should be found in $1: is the name misspelt?"
}

absent() {
    ! names "$1" | grep -qx "$2" || fail "$1 must not depend on $2: see cargo tree -p $1 -e normal -i $2"
}

# Package $1 uses no package of ours but those named after it.
uses_only() {
    package=$1
    shift
    ours=$(cargo tree --locked -p "$package" -e normal --depth 1 --prefix none --format '{p}' | sed '1d; s/ .*//' | grep '^tributary-' || true)
    for name in $ours; do
        case " $* " in
            *" $name "*) ;;
            *) fail "$package must not depend on $name" ;;
        esac
    done
}

for package in protocol learning transport certs coordinator worker tests; do
    cargo tree --locked -p tributary-$package >/dev/null
done

present tributary-coordinator tokio
present tributary-coordinator getrandom
present tributary-transport quinn
present tributary-transport quinn-proto
present tributary-transport rustls
present tributary-learning candle-core
present tributary-transport aws-lc-rs

for name in tokio quinn quinn-proto rustls "candle.*" getrandom aws-lc-rs; do
    absent tributary-protocol "$name"
done
for name in tokio quinn quinn-proto rustls; do
    absent tributary-learning $name
done
# `ring` is in the lock file for other targets, so its name is right as long as it is found there.
if grep -q '^name = "ring"$' Cargo.lock; then
    for package in protocol learning transport certs coordinator worker; do
        absent tributary-$package ring
    done
fi

uses_only tributary-protocol
uses_only tributary-learning tributary-protocol
uses_only tributary-transport tributary-protocol

# candle types never leave `learning`: it alone names candle as a dependency.
for package in protocol transport certs coordinator worker tests; do
    direct=$(cargo tree --locked -p tributary-$package -e normal,dev,build --depth 1 --prefix none | grep '^candle' || true)
    [ -z "$direct" ] || fail "tributary-$package must not use candle itself: $direct"
done

# Clippy reads the clippy.toml beside a package's manifest. A package that does each banned thing once shows that it
# does, and that no line of the file is misspelt.
control=${CARGO_TARGET_DIR:-target}/fences
mkdir -p "$control/src"
cp common/protocol/clippy.toml "$control/"
cat >"$control/Cargo.toml" <<'TOML'
[workspace]

[package]
name = "fence-control"
version = "0.0.0"
edition = "2024"
TOML
bans=$(sed -n 's/.*path = "\([^"]*\)".*/\1/p' common/protocol/clippy.toml)
[ "$(echo "$bans" | wc -l)" -ge 20 ] || fail "common/protocol/clippy.toml has lost bans"
{
    echo '#![allow(unused)]'
    number=0
    for path in $bans; do
        number=$((number + 1))
        case $path in
            std::collections::HashMap) echo "type T$number = $path<u8, u8>;" ;;
            std::collections::HashSet) echo "type T$number = $path<u8>;" ;;
            std::fs::[A-Z]*) echo "type T$number = $path;" ;;
            std::thread::spawn) echo "fn f$number() { let _ = $path(|| ()); }" ;;
            std::thread::sleep) echo "fn f$number(d: std::time::Duration) { $path(d) }" ;;
            std::fs::copy | std::fs::rename | std::fs::write) echo "fn f$number() { let _ = $path(\"a\", \"b\"); }" ;;
            std::fs::*) echo "fn f$number() { let _ = $path(\"a\"); }" ;;
            *) echo "fn f$number() { let _ = $path(); }" ;;
        esac
    done
} >"$control/src/lib.rs"
# Cargo must look again although the file may be the same as last time.
said=$(touch "$control/src/lib.rs" && CARGO_TARGET_DIR="$control/target" cargo clippy --offline --quiet \
    --manifest-path "$control/Cargo.toml" --message-format short 2>&1 || true)
case $said in
    *error*) fail "the control does not compile: $said" ;;
esac
for path in $bans; do
    echo "$said" | grep -q "use of a disallowed .* \`$path\`" || fail "clippy does not ban $path"
done

[ $failed = 0 ] && echo "fences: all stand"
exit $failed
