#!/usr/bin/env bash
# Makes a Python environment with the rivals' packages. What cannot be installed is said, and is a missing line later.
set -uo pipefail
environment=${1:?the directory of the environment}
cd "$(dirname "$0")"

if [ ! -x "$environment/bin/python" ] && ! python3 -m venv "$environment"; then
    echo "no Python environment in $environment: the rivals' figures will be left out" >&2
    exit 0
fi
grep -v '^#' requirements.txt | while read -r package; do
    "$environment/bin/pip" install --quiet --disable-pip-version-check "$package" ||
        echo "$package cannot be installed: its figures will be left out" >&2
done
