"""polars reads a CSV file on one thread, as it reads fastest: types inferred, so that columns of numbers become numbers."""

import os

os.environ["POLARS_MAX_THREADS"] = "1"

import sys
import time

import polars
from serve import serve


def read(_):
    began = time.perf_counter()
    frame = polars.read_csv(sys.argv[1], null_values=["", "?", "NA"])
    seconds = time.perf_counter() - began
    numbers = sum(kind.is_numeric() for kind in frame.dtypes)
    return {"seconds": seconds, "rows": frame.height, "numbers": numbers, "threads": polars.thread_pool_size()}


serve(read)
