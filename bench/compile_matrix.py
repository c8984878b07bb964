"""Compiles every Triton kernel in every tile for every architecture, with no GPU in the machine.

    python -m bench.compile_matrix [--arch 90 ...] [--dtype bfloat16 ...] [--kernel main ...]
                                   [--reduced] [--json FILE]

A row is one kernel in one candidate tile, dtype and variant on one architecture: registers, bytes
spilled, shared memory against what a block may have, tensor-core instructions, code size. The exit
status is 1 if anything does not compile, spills, does not fit, or multiplies half-precision
matrices without tensor cores. ``--reduced`` keeps one row per kernel and architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHS = (80, 86, 89, 90, 100, 120)
# tfloat32: fp32 operands where torch allows its matmul the tensor cores' shorter mantissa
DTYPES = ("bfloat16", "float16", "float32", "tfloat32")
KERNELS = (
    *("shrink", "main", "seed", "bwd_dy", "bwd_da", "sum"),
    *("main_scaled", "bwd_dots", "bwd_dg", "drop"),
)
_TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tfloat32": "fp32"}
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Flags:
    """One way to call a kernel: its constants, what it goes without, its layout."""

    name: str
    constants: dict[str, bool]
    absent: tuple[str, ...]  # arguments that are None: pointers, and the strides of those
    unit_strides: tuple[str, ...]
    rank_strides: tuple[str, ...] = ()  # those that equal the rank in contiguous operands


@dataclass(frozen=True)
class Case:
    """One thing to compile; ``unaligned`` names the sizes and strides that 16 does not divide."""

    kernel: str
    dtype: str
    arch: int
    limit: int  # bytes of shared memory a block may have
    tile: Any
    flags: Flags
    alignment: str
    unaligned: tuple[str, ...]  # ("*",) for all


@dataclass
class Row:
    """What one compilation gave."""

    kernel: str
    variant: str
    dtype: str
    arch: int
    tile: dict[str, int]
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    limit: int = 0
    estimate: int = 0  # what tiles.shared_bytes says of it
    tensor_core: dict[str, int] = field(default_factory=dict)
    code_bytes: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------- what

_X_A = ("stride_xk", "stride_ak")
_FORWARD = ("stride_xk", "stride_wk", "stride_tr", "stride_br", "stride_on", "stride_bias")
_DX = ("stride_xk", "stride_wn", "stride_tr", "stride_bn", "stride_on")
_DY = ("stride_dyn", "stride_br", "stride_tr")
_B_T = ("stride_bn", "stride_tm")
_H_X = ("stride_hr", "stride_xk")
_DY_X_W = ("stride_dyn", "stride_xk", "stride_wk")
_NO_SCALE = ("scale_ptr",)
_NO_BIAS = ("bias_ptr",)
_NO_PRODUCT = ("x_ptr", "w_ptr", "bias_ptr", *_NO_SCALE)
_NO_DOTS = (
    *("y_ptr", "bias_ptr", "dots_ptr", "squares_ptr"),
    *("stride_ym", "stride_yn", "stride_bias"),
)

FUNCTIONS = {
    "shrink": "adapter_linear_fwd_shrink_kernel",
    "main": "adapter_linear_main_kernel",
    "seed": "adapter_linear_main_kernel",
    "bwd_dy": "adapter_linear_bwd_dy_kernel",
    "bwd_da": "adapter_linear_bwd_da_kernel",
    "main_scaled": "adapter_linear_main_kernel",
    "bwd_dots": "adapter_linear_bwd_dy_kernel",
    "bwd_dg": "adapter_linear_bwd_dg_kernel",
    "drop": "adapter_linear_drop_kernel",
    "sum": "adapter_linear_sum_kernel",
}

# the flags that change registers or shared memory, the heaviest first; EVEN_K follows the alignment
FLAGS = {
    "shrink": (
        Flags("dropout", {"DROPOUT": True}, (), _X_A),
        Flags("plain", {"DROPOUT": False}, ("seed_ptr",), _X_A),
    ),
    "main": (
        Flags("dx dropout", {"DROPOUT": True}, (*_NO_BIAS, *_NO_SCALE), _DX, ("stride_tm",)),
        Flags(
            "forward bias",
            {"HAS_BIAS": True},
            ("seed_ptr", *_NO_SCALE),
            _FORWARD,
            ("stride_tm", "stride_bn"),
        ),
        Flags("dx", {}, ("seed_ptr", *_NO_BIAS, *_NO_SCALE), _DX, ("stride_tm",)),
    ),
    "main_scaled": (
        Flags("dx dropout", {"DROPOUT": True, "SCALE_IN": True}, _NO_BIAS, _DX, ("stride_tm",)),
        Flags(
            "forward bias",
            {"HAS_BIAS": True, "SCALE_OUT": True},
            ("seed_ptr",),
            _FORWARD,
            ("stride_tm", "stride_bn"),
        ),
        Flags("dx", {"SCALE_IN": True}, ("seed_ptr", *_NO_BIAS), _DX, ("stride_tm",)),
    ),
    "seed": (Flags("dx dropout", {"DROPOUT": True}, _NO_PRODUCT, _DX, ("stride_tm",)),),
    "bwd_dy": (
        Flags("h db", {"NEED_H": True, "NEED_DB": True}, _NO_DOTS, _DY, _B_T),
        Flags("h", {"NEED_H": True}, ("t_ptr", "db_ptr", *_NO_DOTS), _DY, _B_T),
    ),
    "bwd_da": (
        Flags("dropout", {"DROPOUT": True}, (), _H_X, ("stride_hm",)),
        Flags("plain", {}, ("seed_ptr",), _H_X, ("stride_hm",)),
    ),
    "bwd_dots": (
        Flags(
            "h db dots",
            {"NEED_H": True, "NEED_DB": True, "NEED_DOTS": True, "HAS_BIAS": True},
            (),
            (*_DY, "stride_yn", "stride_bias"),
            _B_T,
        ),
    ),
    "bwd_dg": (Flags("dg", {}, (), _DY_X_W),),
    "drop": (Flags("drop", {}, (), ("stride_xk",)),),
    "sum": (Flags("sum", {}, (), ()),),
}

_NO_MATRICES = ("sum", "drop")  # what multiplies none, and needs no tensor core

# element types other than the compute dtype
_POINTERS = {"seed_ptr": "i64", "asked_ptr": "i1"} | dict.fromkeys(
    ("h_ptr", "db_ptr", "da_ptr", "dg_ptr", "dots_ptr", "squares_ptr", "scale_ptr"), "fp32"
)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The rows that the command line asks for."""
    import torch

    from fastlora.ops.adapter_linear import tiles

    for number in args.arch:
        arch = tiles.arch_of(number, sm_count=128)
        for kernel in args.kernel:
            for dtype in args.dtype:
                if kernel in _NO_MATRICES and dtype == "tfloat32":
                    continue
                fixed = (kernel, dtype, number, arch.shared_bytes)
                torch_dtype = getattr(torch, dtype.removeprefix("t"))
                slots = tiles.slots(kernel, torch_dtype, arch)
                if args.reduced:
                    tile = max(slots.values(), key=_area)
                    yield Case(*fixed, tile, FLAGS[kernel][0], "all 16", ())
                    continue
                for slot, tile in slots.items():
                    for flags in FLAGS[kernel]:
                        for alignment, unaligned in _alignments(slot, slots, flags):
                            yield Case(*fixed, tile, flags, alignment, unaligned)


def _alignments(
    slot: tuple[str, int], slots: dict[tuple[str, int], Any], flags: Flags
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, unaligned arguments) of the operands a slot's tile has to serve."""
    size, rank = slot
    if size == "irregular":
        yield "irregular", ("*",)
        return
    yield "all 16", ()
    if rank == min(other for name, other in slots if name == size):
        yield "rank 8", ("R", *flags.rank_strides)


def _area(tile: Any) -> int:
    """Elements of a tile's operands and result, to tell the largest."""
    sides = [s for s in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.BLOCK_R) if s]
    return sum(a * b for i, a in enumerate(sides) for b in sides[i + 1 :])


def specialise(case: Case) -> tuple[Any, dict[str, str], dict[str, Any], dict[Any, Any]]:
    """(function, signature, constants, attributes) as a launch with such operands would have."""
    from fastlora.ops.adapter_linear import triton as backend

    function = getattr(backend, FUNCTIONS[case.kernel])
    element = _TRITON_NAMES[case.dtype]
    constants: dict[str, Any] = dict.fromkeys(case.flags.absent)
    constants |= dict.fromkeys(case.flags.unit_strides, 1)
    signature: dict[str, str] = {}
    attributes: dict[Any, Any] = {}
    for index, param in enumerate(function.params):
        name = param.name
        if name in constants:
            pass
        elif name == "INPUT_PRECISION":
            constants[name] = "tf32" if case.dtype == "tfloat32" else "ieee"
        elif name == "EVEN_K":
            constants[name] = not case.unaligned or case.unaligned[0] == "R"
        elif name == "HAS_PRODUCT":
            constants[name] = case.kernel != "seed"
        elif hasattr(case.tile, name):
            constants[name] = getattr(case.tile, name)
        elif param.is_constexpr:
            constants[name] = case.flags.constants.get(name, False)
        elif name.endswith("_ptr"):
            # the sums and what is summed are fp32, except that H of one tile is stored as it is
            own = "fp32" if name == "parts_ptr" else _POINTERS.get(name, element)
            signature[name] = "*" + (element if (case.kernel, name) == ("bwd_da", "h_ptr") else own)
            if case.alignment != "irregular":
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif name == "scale":
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
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastlora.ops.adapter_linear import tiles

    variant = f"{case.flags.name}, {case.alignment}"
    row = Row(case.kernel, variant, case.dtype, case.arch, asdict(case.tile), limit=case.limit)
    arch = tiles.arch_of(case.arch, sm_count=1)
    element = getattr(torch, case.dtype.removeprefix("t"))
    row.estimate = tiles.shared_bytes(case.kernel, case.tile, element, arch)
    function, signature, constants, attributes = specialise(case)
    started = time.perf_counter()
    try:
        compiled = triton.compile(
            ASTSource(function, signature, constants, attributes),
            target=GPUTarget("cuda", case.arch, 32),
            options={"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages},
        )
    except Exception as error:  # a row of the table, and the reason for a non-zero exit
        row.problems.append("does not compile: " + " ".join(str(error).split())[:200])
        row.seconds = time.perf_counter() - started
        return row
    row.seconds = time.perf_counter() - started
    row.shared = compiled.metadata.shared
    _read_binary(compiled.asm["cubin"], row)
    row.problems += problems(row)
    return row


def problems(row: Row) -> list[str]:
    """What makes a compiled row fail, as sentences; [] if it is sound."""
    found = []
    if row.spilled:
        found.append(f"spills {row.spilled} bytes")
    if row.shared > row.limit:
        found.append(f"takes {row.shared} of {row.limit} bytes of shared memory")
    # sm_100 adds a few words of barriers to any block
    if row.shared > row.estimate + 64:
        found.append(
            f"takes {row.shared} bytes of shared memory, more than the {row.estimate} estimated"
        )
    matrix = row.kernel not in _NO_MATRICES and row.dtype in ("bfloat16", "float16")
    if matrix and not row.tensor_core:
        found.append("multiplies without tensor cores")
    return found


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_binary(cubin: bytes, row: Row) -> None:
    """Registers, stack and instructions of a cubin, from the tools that triton brings along."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True
        )
        listing = subprocess.run([_tool("nvdisasm"), str(path)], capture_output=True, text=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout))
    instructions = _INSTRUCTION.findall(listing.stdout)
    if not found or not instructions:
        said = (usage.stderr + listing.stderr).strip()[:200]
        row.problems.append(f"the binary could not be read: {said}")
        return
    row.registers = int(found["REG"])
    row.spilled = int(found["STACK"]) + int(found.get("LOCAL", 0))
    row.code_bytes = 16 * len(instructions)
    for text in instructions:
        for name in _TENSOR_CORE.findall(text.split(".")[0]):
            row.tensor_core[name] = row.tensor_core.get(name, 0) + 1


# --------------------------------------------------------------------------------------- output

_HEAD = (
    f"{'arch':>4} {'kernel':<11} {'dtype':<9} {'variant':<23} {'tile':<27} "
    f"{'regs':>4} {'spill':>5} {'shared':>7} {'limit':>7} {'tensor cores':<14} {'code':>7}  verdict"
)


def _line(row: Row) -> str:
    sides = "x".join(
        f"{name[-1].lower()}{row.tile[name]}"
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R")
        if row.tile[name]
    )
    tile = f"{sides} w{row.tile['num_warps']} s{row.tile['num_stages']}"
    cores = " ".join(f"{name}:{count}" for name, count in sorted(row.tensor_core.items())) or "-"
    return (
        f"{row.arch:>4} {row.kernel:<11} {row.dtype:<9} {row.variant:<23} {tile:<27} "
        f"{row.registers:>4} {row.spilled:>5} {row.shared:>7} {row.limit:>7} {cores:<14} "
        f"{row.code_bytes:>7}  {'; '.join(row.problems) or 'ok'}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; an option left out means all of its values."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--reduced", action="store_true", help="bf16, the largest tile only")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    args = parser.parse_args(argv)
    if args.dtype is None:
        args.dtype = ("bfloat16",) if args.reduced else DTYPES
    return args


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints the table, returns the exit status."""
    args = parse(argv)
    # under the interpreter the kernels are no longer compilable; triton reads this when imported
    os.environ.pop("TRITON_INTERPRET", None)
    started = time.perf_counter()
    todo = list(cases(args))
    rows: list[Row] = []
    print(_HEAD, flush=True)
    for number, case in enumerate(todo, start=1):
        row = compile_case(case)
        rows.append(row)
        print(_line(row), flush=True)
        elapsed = time.perf_counter() - started
        note = f"{number}/{len(todo)} compiled, {elapsed:.0f} s, sm_{row.arch} {row.kernel}"
        print(f"\r{note:<60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
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
