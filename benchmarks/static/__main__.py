"""The kernels judged without a GPU: compiled for five architectures, their machine code counted.

    python -m benchmarks.static                # one variant of each kernel, as the tests do
    python -m benchmarks.static --all --jobs 2 # every variant into benchmarks/results/static.csv
    python -m benchmarks.static --markdown     # the table as it is, a line a kernel

The numbers are static: registers, memory, instructions that stand in the code; with --all also what tiles ask of tensor
cores and memory beyond what is useful (traffic.py). They tell what cannot be fast, and they are no speed. Ends with 1,
and names each, where a kernel of ours spills, has an atomic, asks for more shared memory than a block may have, or
multiplies 16-bit matrices without tensor cores or without asynchronous copies; without --all also where a variant is
not as the table says.

A row whose key is in the table is not compiled again. The key is of everything that the compiler is given.
"""

from __future__ import annotations

import sys
import time

import tyro

from benchmarks.static import table


def main(all: bool = False, jobs: int = 1, markdown: bool = False) -> int:
    """Judge the kernels.

    all: make the whole table. jobs: processes that compile. markdown: print the table that exists.
    """
    if markdown:
        print(table.markdown(table.read()))
        return 0
    known, variants, began = table.read(), table.variants(), time.perf_counter()
    if all:
        rows = table.make(variants, known, jobs, keep=table.write)
        failures = table.failures(rows)
    else:
        rows = table.make(table.sample(variants), {}, jobs, with_work=False)
        failures = table.failures(rows)
        for row in rows.values():
            failures += [f"{table.named(row)}: {change}" for change in table.changes(known.get(row["key"]), row)]
    print(f"{len(rows)} of {len(variants)} variants, {time.perf_counter() - began:.0f} s")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
