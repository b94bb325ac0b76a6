#!/usr/bin/env python3
"""Draw the demo's sample from all flights that left New York in 2013.

    python3 deploy/demo/sample.py flights.csv.gz

writes ewr.csv, jfk.csv, lga.csv and heldout.csv beside this file. Nothing but the standard library, and no
generator with a state: a row's place is the SHA-256 of the seed and its line number, so the same input gives the
same bytes with every Python. The smallest HELD_OUT hashes are the held-out file; after them, the smallest
EACH of every airport are that airport's shard. Rows keep the order of the source, which is the order of departure.
"""

import csv
import datetime
import gzip
import hashlib
import pathlib
import sys

SEED = "tributary demo 1"
HELD_OUT = 24_000
EACH = 4_000
AIRPORTS = ("EWR", "JFK", "LGA")
LATE_MINUTES = 15
COLUMNS = ("month", "weekday", "hour", "carrier", "dest", "distance", "dep_delay", "late")


def example(flight):
    """The eight cells of one flight, or None if it never arrived (cancelled or diverted)."""
    if flight["arr_delay"] in ("", "NA"):
        return None
    date = datetime.date(int(flight["year"]), int(flight["month"]), int(flight["day"]))
    late = int(float(flight["arr_delay"]) > LATE_MINUTES)
    return (
        date.month,
        date.isoweekday(),
        int(flight["hour"]),
        flight["carrier"],
        flight["dest"],
        int(flight["distance"]),
        int(flight["dep_delay"]),
        late,
    )


def place(line):
    """Where a row stands in the drawing: a number that depends on the seed and its line only."""
    return hashlib.sha256(f"{SEED}:{line}".encode()).digest()


def read(path):
    """Every usable flight as (line, airport, cells), in the order of the source."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as source:
        for line, flight in enumerate(csv.DictReader(source), start=2):
            cells = example(flight)
            if cells is not None:
                yield line, flight["origin"], cells


def write(path, flights):
    """The given flights as a CSV file, in the order of the source."""
    with open(path, "w", encoding="utf-8", newline="") as sink:
        rows = csv.writer(sink, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows(cells for _, _, cells in sorted(flights))


def main(source):
    here = pathlib.Path(__file__).parent
    drawn = sorted(read(source), key=lambda flight: place(flight[0]))
    write(here / "heldout.csv", drawn[:HELD_OUT])
    for airport in AIRPORTS:
        shard = [flight for flight in drawn[HELD_OUT:] if flight[1] == airport][:EACH]
        write(here / f"{airport.lower()}.csv", shard)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: sample.py flights.csv.gz")
    main(sys.argv[1])
