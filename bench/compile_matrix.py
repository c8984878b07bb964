"""Compiles every kernel in every tile for every architecture, with no GPU in the machine.

    python -m bench.compile_matrix [--arch 90 ...] [--dtype bfloat16 ...] [--kernel main ...]
                                   [--reduced] [--json FILE]

A row is one Triton kernel in one candidate tile, dtype and variant on one architecture: registers,
bytes spilled, shared memory against what a block may have, tensor-core instructions, code size. The
kernels of csrc/cuda come with them ("cuda" among the kernels) where there is an nvcc; where it
does not know an architecture, that is said. The exit status is 1 if anything does not compile,
spills, does not fit, or multiplies half-precision matrices without tensor cores. ``--reduced``
keeps one row per Triton kernel and architecture.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench import names
from bench.compile_cases import PROVIDERS, cuda
from bench.compile_cases.binary import functions
from bench.compile_cases.case import Case
from bench.compile_cases.row import Row

ARCHS = (80, 86, 89, 90, 100, 120)
# tfloat32: fp32 operands where torch allows its matmul the tensor cores' shorter mantissa
DTYPES = ("bfloat16", "float16", "float32", "tfloat32")
CUDA = "cuda"  # csrc's kernels, among the names of Triton's
_TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tfloat32": "fp32"}
_FLOATS = ("scale", "scaling", "scaling_low")  # arguments that are no integers


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The rows that the command line asks for."""
    for arch in args.arch:
        for kernel in args.kernel:
            if kernel == CUDA:
                continue
            for dtype in args.dtype:
                yield from PROVIDERS[kernel].cases(kernel, dtype, arch, args.reduced)


def specialise(case: Case) -> tuple[Any, dict[str, str], dict[str, Any], dict[Any, Any]]:
    """(function, signature, constants, attributes) as a launch with such operands would have."""
    function = getattr(importlib.import_module(case.module), case.function)
    constants: dict[str, Any] = dict.fromkeys(case.flags.absent)
    constants |= dict.fromkeys(case.flags.unit_strides, 1)
    signature: dict[str, str] = {}
    attributes: dict[Any, Any] = {}
    for index, param in enumerate(function.params):
        name = param.name
        if name in constants:
            pass
        elif hasattr(case.tile, name):
            constants[name] = getattr(case.tile, name)
        elif param.is_constexpr:
            constants[name] = (case.constants | case.flags.constants).get(name, False)
        elif name.endswith("_ptr"):
            signature[name] = "*" + case.pointers.get(name, _TRITON_NAMES[case.dtype])
            if case.alignment != "irregular":
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in _FLOATS or name in case.floats:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            special = not param.do_not_specialize and case.unaligned != ("*",)
            if special and name not in case.unaligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        if name in constants:
            signature[name] = "constexpr"
    return function, signature, constants, attributes


# ----------------------------------------------------------------------------------------- how


def compile_case(case: Case) -> Row:
    """Compiles one case and reads its binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = f"{case.flags.name}, {case.alignment}"
    row = Row(case.kernel, variant, case.dtype, case.arch, asdict(case.tile), limit=case.limit)
    row.estimate, row.multiplies = case.estimate, case.multiplies
    function, signature, constants, attributes = specialise(case)
    started = time.perf_counter()
    try:
        compiled = triton.compile(
            ASTSource(function, signature, constants, attributes),
            target=GPUTarget("cuda", case.arch, 32),
            options={"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages}
            | case.options,
        )
    except Exception as error:  # a row of the table, and the reason for a non-zero exit
        row.problems.append("does not compile: " + " ".join(str(error).split())[:200])
        row.seconds = time.perf_counter() - started
        return row
    row.seconds = time.perf_counter() - started
    row.shared = compiled.metadata.shared
    try:
        (found,) = functions(compiled.asm["cubin"]).values()
    except ValueError as error:
        row.problems.append(str(error))
    else:
        row.take(found)
    return row


def cuda_jobs(archs: tuple[int, ...]) -> tuple[list[Callable[[], list[Row]]], list[str]]:
    """(what compiles csrc's kernels, what is left out and why)."""
    compiler = cuda.nvcc()
    if compiler is None:
        return [], ["there is no nvcc: csrc/cuda is left out"]
    known = cuda.architectures(compiler)
    jobs = [
        partial(cuda.compile_source, compiler, source, arch)
        for arch in archs
        for source in cuda.sources()
        if arch in known
    ]
    return jobs, [
        f"this nvcc does not compile for sm_{arch}: csrc/cuda is left out there"
        for arch in archs
        if arch not in known
    ]


# --------------------------------------------------------------------------------------- output


def _as_rows(case: Case) -> list[Row]:
    return [compile_case(case)]


_HEAD = (
    f"{'arch':>4} {'kernel':<12} {'dtype':<9} {'variant':<23} {'tile':<27} "
    f"{'regs':>4} {'spill':>5} {'shared':>7} {'limit':>7} {'tensor cores':<14} {'code':>7}  verdict"
)


def _line(row: Row) -> str:
    sides = "x".join(
        f"{name[-1].lower()}{row.tile[name]}"
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R")
        if row.tile.get(name)
    )
    tile = f"{sides} w{row.tile['num_warps']} s{row.tile['num_stages']}" if row.tile else "-"
    cores = " ".join(f"{name}:{count}" for name, count in sorted(row.tensor_core.items())) or "-"
    return (
        f"{row.arch:>4} {row.kernel:<12} {row.dtype:<9} {row.variant:<23} {tile:<27} "
        f"{row.registers:>4} {row.spilled:>5} {row.shared:>7} {row.limit:>7} {cores:<14} "
        f"{row.code_bytes:>7}  {'; '.join(row.problems) or 'ok'}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; an option left out means all of its values."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--kernel", nargs="+", default=[*PROVIDERS, CUDA])
    parser.add_argument("--reduced", action="store_true", help="bf16, the largest tile only")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    args = parser.parse_args(argv)
    try:
        args.kernel = [names.check("kernel", name, (*PROVIDERS, CUDA)) for name in args.kernel]
    except names.UnknownName as error:
        parser.error(str(error))
    if args.dtype is None:
        args.dtype = ("bfloat16",) if args.reduced else DTYPES
    return args


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints the table, returns the exit status."""
    args = parse(argv)
    # under the interpreter the kernels are no longer compilable; triton reads this when imported
    os.environ.pop("TRITON_INTERPRET", None)
    started = time.perf_counter()
    todo: list[Callable[[], list[Row]]] = [partial(_as_rows, case) for case in cases(args)]
    left_out: list[str] = []
    if CUDA in args.kernel:
        jobs, left_out = cuda_jobs(args.arch)
        todo += jobs
    rows: list[Row] = []
    print(_HEAD, flush=True)
    for number, job in enumerate(todo, start=1):
        for row in job():
            rows.append(row)
            print(_line(row), flush=True)
        elapsed = time.perf_counter() - started
        note = f"{number}/{len(todo)} compiled, {elapsed:.0f} s, sm_{row.arch} {row.kernel}"
        print(f"\r{note:<60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for reason in left_out:
        print(reason)
    bad = [row for row in rows if row.problems]
    seconds = time.perf_counter() - started
    print(
        f"{len(rows)} rows, {len(bad)} with problems, "
        f"{sum(bool(row.spilled) for row in rows)} spill, "
        f"{sum(row.shared > row.limit for row in rows)} do not fit; {seconds:.0f} s"
    )
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
