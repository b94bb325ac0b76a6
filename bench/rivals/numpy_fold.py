"""numpy folds a payload into the ring: cells += rint(x * weight * 2^s), modulo 2^64, in preallocated arrays.

By blocks whose temporaries stay in the second-level cache, which is numpy's fastest way to do it: with whole arrays each
of its four passes goes through memory.
"""

import sys
import time

import numpy
from serve import serve

payload, scale, block = sys.argv[1], float(sys.argv[2]), 1 << 15
numbers = numpy.fromfile(payload, dtype="<f4")
cells = numpy.zeros(len(numbers), dtype=numpy.int64)
products = numpy.empty(block, dtype=numpy.float64)
entries = numpy.empty(block, dtype=numpy.int64)


def fold(_):
    began = time.perf_counter()
    for at in range(0, len(numbers), block):
        some = numbers[at : at + block]
        to = cells[at : at + block]
        product, entry = products[: len(some)], entries[: len(some)]
        numpy.multiply(some, scale, out=product, dtype=numpy.float64)
        numpy.rint(product, out=product)
        numpy.copyto(entry, product, casting="unsafe")
        numpy.add(to, entry, out=to)
    return {"seconds": time.perf_counter() - began, "first": int(cells[0])}


fold(None)
serve(fold)
