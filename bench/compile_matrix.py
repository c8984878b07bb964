"""Compiles every kernel in every tile for every architecture, with no GPU in the machine.

    python -m bench.compile_matrix [--arch 90 ...] [--dtype bfloat16 ...] [--kernel main ...]
                                   [--reduced] [--workers 2] [--json FILE]

A row is one Triton kernel in one candidate tile, dtype and variant on one architecture: registers,
bytes spilled, shared memory against what a block may have, tensor-core instructions, code size. The
kernels of csrc/cuda come with them ("cuda" among the kernels) where there is an nvcc; where it
does not know an architecture, that is said. The exit status is 1 if anything does not compile,
spills, does not fit, or multiplies half-precision matrices without tensor cores. ``--reduced``
keeps one row per Triton kernel and architecture.

``--json`` writes the rows to a file as they come. Rows of that file made from the same source by
the same compiler are taken from it: the whole matrix takes hours, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from multiprocessing import get_context
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
FORMAT = "fastlora.bench.compile_matrix/1"
_SECONDS_BETWEEN_WRITES = 60.0
_FLOATS = ("scale", "scaling", "scaling_low")  # arguments that are no integers


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The rows that the command line asks for."""
    for arch in args.arch:
        for kernel in args.kernel:
            if kernel == CUDA:
                continue
            for dtype in args.dtype:
                yield from PROVIDERS[kernel].cases(kernel, dtype, arch, args.reduced)


def everything() -> list[Case | cuda.Source]:
    """The whole matrix, and csrc's kernels where there is an nvcc."""
    args = argparse.Namespace(arch=ARCHS, kernel=PROVIDERS, dtype=DTYPES, reduced=False)
    return [*cases(args), *cuda_cases(ARCHS)[0]]


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


def cuda_cases(archs: tuple[int, ...]) -> tuple[list[cuda.Source], list[str]]:
    """(csrc's files and the architectures to compile them for, what is left out and why)."""
    compiler = cuda.nvcc()
    if compiler is None:
        return [], ["there is no nvcc: csrc/cuda is left out"]
    known = cuda.architectures(compiler)
    return [
        cuda.Source(compiler, path, arch)
        for arch in archs
        for path in cuda.sources()
        if arch in known
    ], [
        f"this nvcc does not compile for sm_{arch}: csrc/cuda is left out there"
        for arch in archs
        if arch not in known
    ]


def compile_any(todo: Case | cuda.Source) -> list[Row]:
    """The rows of one thing to compile, in whichever process."""
    # under the interpreter the kernels are no longer compilable; triton reads this when imported
    os.environ.pop("TRITON_INTERPRET", None)
    if isinstance(todo, Case):
        return [compile_case(todo)]
    return cuda.compile_source(todo.compiler, todo.path, todo.arch)


@contextmanager
def compilers(workers: int) -> Iterator[Callable[[Case | cuda.Source], Callable[[], list[Row]]]]:
    """What starts a compilation and gives what waits for its rows."""
    if workers == 1:
        yield lambda todo: partial(compile_any, todo)
        return
    # fork would copy torch's threads half-way
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            yield lambda todo: pool.submit(compile_any, todo).result
        finally:
            pool.shutdown(cancel_futures=True)


@cache
def _sources() -> dict[tuple[str, str], str]:
    """Triton's key of each kernel's source with all it calls. Where functions call each other it
    depends on which was asked first, so all are, in one order."""
    import triton

    asked = dict.fromkeys((c.module, c.function) for c in everything() if isinstance(c, Case))
    return {
        (module, name): f"{triton.__version__} "
        + getattr(importlib.import_module(module), name).cache_key
        for module, name in asked
    }


def key(todo: Case | cuda.Source) -> str:
    """What the rows depend on: a kernel's source with all it calls, the compiler, the case."""
    if isinstance(todo, Case):
        made_of = f"{_sources()[todo.module, todo.function]} {todo}"
    else:
        made_of = todo.text()
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------- output


class File:
    """Rows by the key of what they were compiled from, on disk."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, list[Row]] = {}
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{path} is no file of this command ({FORMAT})")
        for entry in found["rows"]:
            self.rows.setdefault(entry.pop("key"), []).append(Row(**entry))

    def write(self, keys: Iterable[str]) -> None:
        """The rows of ``keys`` that there are, one a line; the old file stays until the new is."""
        if self.path is None:
            return
        lines = [
            json.dumps({"key": key} | asdict(row)) for key in keys for row in self.rows.get(key, [])
        ]
        text = f'{{"format": "{FORMAT}", "rows": [\n' + ",\n".join(lines) + "\n]}\n"
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)


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
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write the rows there too, and go on from it"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    try:
        args.kernel = [names.check("kernel", name, (*PROVIDERS, CUDA)) for name in args.kernel]
        args.file = File(args.json)
    except ValueError as error:
        parser.error(str(error))
    if args.dtype is None:
        args.dtype = ("bfloat16",) if args.reduced else DTYPES
    return args


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints the table, returns the exit status."""
    args = parse(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    started = written = time.perf_counter()
    todo: list[Case | cuda.Source] = list(cases(args))
    left_out: list[str] = []
    if CUDA in args.kernel:
        more, left_out = cuda_cases(args.arch)
        todo += more
    # without a file nothing is looked up, and no kernel is imported before it is compiled
    keys = [key(one) if args.json else str(number) for number, one in enumerate(todo)]
    file: File = args.file
    # what the file has of other kernels stays there; what no row of today was made from goes
    wanted = dict.fromkeys([*(map(key, everything()) if args.json else ()), *keys])
    taken = sum(len(file.rows.get(one, [])) for one in keys)
    rows: list[Row] = []
    print(_HEAD, flush=True)
    with compilers(args.workers) as submit:
        coming = [
            None if k in file.rows else submit(one) for k, one in zip(keys, todo, strict=True)
        ]
        try:
            for number, (one, made) in enumerate(zip(keys, coming, strict=True), start=1):
                if made is not None:
                    file.rows[one] = made()
                rows += file.rows[one]
                for row in file.rows[one]:
                    print(_line(row), flush=True)
                now = time.perf_counter()
                note = f"{number}/{len(todo)} compiled, {now - started:.0f} s"
                print(f"\r{note:<60}", end="", file=sys.stderr, flush=True)
                if now - written > _SECONDS_BETWEEN_WRITES:
                    file.write(wanted)
                    written = now
        finally:
            file.write(wanted)
    print(file=sys.stderr)
    for reason in left_out:
        print(reason)
    bad = [row for row in rows if row.problems]
    seconds = time.perf_counter() - started
    print(
        f"{len(rows)} rows, {len(bad)} with problems, "
        f"{sum(bool(row.spilled) for row in rows)} spill, "
        f"{sum(row.shared > row.limit for row in rows)} do not fit; "
        + (f"{taken} taken from the file; " if taken else "")
        + f"{seconds:.0f} s"
    )
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
