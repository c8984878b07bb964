"""Times small eigenproblems and SVDs by the native core against torch.linalg.

    python -m bench.small_solvers [--op symmetric_eigen|small_svd] [--dtype float64] [--threads 2]
                                  [--batches 1,4,8,64] [--sizes 4,8,16,32,48,64,96,128]
                                  [--rounds 7] [--json FILE]

Random matrices (symmetric ones: A + Aᵀ). Both ways run interleaved in one process, each round in
another order; a row gives the medians in microseconds a call, with the fastest and slowest round,
and how many times faster the native one is. Before a size is timed, residual and orthogonality of
both ways are held to 64 units of the dtype; where one is off, nothing is reported and the exit
status is 1. "rule" is what the operation takes by itself, and is marked where it is the slower way
by more than a tenth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from bench.measure import whole
from fastlora.ops import library
from fastlora.ops.backend import cpu_vendor
from fastlora.ops.small_solvers import op
from fastlora.ops.small_solvers.contract import is_faster_native
from fastlora.ops.small_solvers.reference import eigen_errors, svd_errors

WAYS = ("native", "eager")
UNITS = 64.0


def main(argv: list[str] | None = None) -> int:
    """Checks, times, prints; the exit status is 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.small_solvers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", choices=("symmetric_eigen", "small_svd"), default="symmetric_eigen")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,4,8,64")
    parser.add_argument("--sizes", default="4,8,16,32,48,64,96,128")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    if reason := library.missing():
        print(reason, file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    solve = getattr(op, args.op)
    errors = eigen_errors if args.op == "symmetric_eigen" else svd_errors

    conditions = (
        f"{args.op}, {args.dtype}, cpu ({cpu_vendor()}), {args.threads} threads, "
        f"torch {torch.__version__}, median of {args.rounds}, µs a call"
    )
    print(conditions)
    print(f"{'n':>4} {'batch':>6} {'native':>25} {'torch.linalg':>25} {'times':>6}  rule")
    figures = []
    for n in map(int, args.sizes.split(",")):
        for batch in map(int, args.batches.split(",")):
            torch.manual_seed(0)
            a = torch.randn(batch, n, n, dtype=dtype)
            if args.op == "symmetric_eigen":
                a = a + a.mT
            for way in WAYS:
                if max(errors(a, *solve(a, backend=way))) > UNITS * torch.finfo(dtype).eps:
                    print(f"{way} is wrong at n={n}: nothing is reported", file=sys.stderr)
                    return 1
            calls = {way: partial(solve, a, backend=way) for way in WAYS}
            taken = whole(calls, args.rounds, "cpu", warmup=1)
            times = {way: [took * 1e3 for took in taken[way]] for way in WAYS}
            medians = {way: statistics.median(times[way]) for way in WAYS}
            gain = medians["eager"] / medians["native"]
            native = is_faster_native(batch, n)
            slower = gain < 0.9 if native else gain > 1.1
            cells = [
                f"{medians[way]:>9.0f} ({min(times[way]):.0f}–{max(times[way]):.0f})".rjust(25)
                for way in WAYS
            ]
            rule = ("native" if native else "eager") + (" !" if slower else "")
            print(f"{n:>4} {batch:>6} {cells[0]} {cells[1]} {gain:>6.2f}  {rule}", flush=True)
            figures.append({"n": n, "batch": batch, "µs": times})
    if args.json:
        text = json.dumps({"conditions": conditions, "figures": figures}, ensure_ascii=False)
        Path(args.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
