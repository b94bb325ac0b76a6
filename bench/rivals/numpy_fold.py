"""numpy folds a payload into the ring: cells += rint(x * weight * 2^s), modulo 2^64, in preallocated arrays.

By blocks whose temporaries stay in the second-level cache: with whole arrays each of its four passes goes through memory.
On as many threads as there are, each with its own slices, since numpy's loops let go of the interpreter; or on one. "rint"
rounds with numpy's function; "bits" adds 1.5 * 2^52 and takes the number out of the bits of the sum, as ours does. Of each,
the fastest number of threads and length of block is found first, and then used.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy
from serve import serve

payload, scale = sys.argv[1], float(sys.argv[2])
numbers = numpy.fromfile(payload, dtype="<f4")
cells = numpy.zeros(len(numbers), dtype=numpy.int64)
cores = len(os.sched_getaffinity(0))
pool = ThreadPoolExecutor(cores)
rounder = numpy.float64(1.5 * 2**52)
rounder_bits = rounder.view(numpy.int64)
blocks = [1 << 14, 1 << 15, 1 << 16, 3 << 15, 1 << 17]
temporaries = [(numpy.empty(max(blocks)), numpy.empty(max(blocks), dtype=numpy.int64)) for _ in range(cores)]


def by_rint(some, to, product, entry):
    numpy.multiply(some, scale, out=product, dtype=numpy.float64)
    numpy.rint(product, out=product)
    numpy.copyto(entry, product, casting="unsafe")
    numpy.add(to, entry, out=to)


def by_bits(some, to, product, _):
    numpy.multiply(some, scale, out=product, dtype=numpy.float64)
    numpy.add(product, rounder, out=product)
    bits = product.view(numpy.int64)
    numpy.subtract(bits, rounder_bits, out=bits)
    numpy.add(to, bits, out=to)


ways = {"rint": by_rint, "bits": by_bits}


def part(way, block, first, last, thread):
    products, entries = temporaries[thread]
    for at in range(first, last, block):
        end = min(at + block, last)
        way(numbers[at:end], cells[at:end], products[: end - at], entries[: end - at])


def fold(way, threads, block):
    began = time.perf_counter()
    if threads == 1:
        part(way, block, 0, len(numbers), 0)
    else:
        cuts = [len(numbers) * at // threads for at in range(threads + 1)]
        parts = [pool.submit(part, way, block, cuts[at], cuts[at + 1], at) for at in range(threads)]
        for each in parts:
            each.result()
    return time.perf_counter() - began


def fastest(way):
    tried = [(threads, block) for threads in sorted({1, cores}) for block in blocks]
    return min(tried, key=lambda arrangement: min(fold(way, *arrangement) for _ in range(3)))


found = {}


def answer(request):
    way = ways[request["by"]]
    if way not in found:
        found[way] = fastest(way)
    threads, block = found[way]
    arrangement = f"numpy is fastest on {threads} threads by blocks of {block} numbers"
    return {"seconds": fold(way, threads, block), "arrangement": arrangement, "first": int(cells[0])}


serve(answer)
