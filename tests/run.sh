#!/bin/sh
# Runs every test, with what tests/setup.sh could get, and says what was not tested. `make test` calls this last.
#
# A test that lacks something appends a line to the file that TRIBUTARY_NOT_TESTED names, and passes. In CI
# (CI=true, as every CI service sets it) such a line fails the run.
set -eu
cd "$(dirname "$0")/.."

TRIBUTARY_NOT_TESTED=$(mktemp "${TMPDIR:-/tmp}/tributary-not-tested.XXXXXX")
export TRIBUTARY_NOT_TESTED
trap 'rm -f "$TRIBUTARY_NOT_TESTED"' EXIT

found=$(tests/setup.sh)
eval "$found"
for name in TRIBUTARY_PROMETHEUS TRIBUTARY_PROMTOOL TRIBUTARY_FAKETIME; do
    eval "value=\${$name-}"
    if [ -n "$value" ]; then
        export "${name?}"
        echo "$name=$value"
    else
        unset "$name"
        echo "everything that needs $name: it could not be fetched (tests/setup.sh says why)" >>"$TRIBUTARY_NOT_TESTED"
    fi
done

status=0
RAYON_NUM_THREADS=1 CANDLE_NUM_THREADS=1 ${CARGO:-cargo} test --locked --workspace --no-fail-fast || status=$?

if [ -s "$TRIBUTARY_NOT_TESTED" ]; then
    echo
    echo "NOT TESTED:"
    sort -u "$TRIBUTARY_NOT_TESTED" | sed 's/^/  - /'
    [ "${CI-}" != true ] || [ $status != 0 ] || status=1
fi
exit $status
