"""The four kernels of ``sign_momentum``, in every dtype that its lists may hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.compile_cases.case import Case, Flags
from fastlora.ops.adapter_linear.tiles import arch_of

KERNELS = ("sign_survey", "sign_finish", "sign_rows", "sign_update")

_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_POINTERS = {
    "table_ptr": "i64",
    "chunks_ptr": "i64",
    "keys_ptr": "i64",
    "sums_ptr": "fp64",
    "given_ptr": "fp64",
    "entries_ptr": "i64",
    "starts_ptr": "i64",
    "masks_ptr": "i64",
    "row_rates_ptr": "fp32",
    "finite_ptr": "i32",
    "skip_ptr": "i8",
    "lost_ptr": "i8",
    "kinds_ptr": "i8",
    "rates_ptr": "fp32",
    "centers_ptr": "fp32",
}
_FLOATS = ("a", "b", "c", "d", "shrink")


@dataclass(frozen=True)
class Launch:
    """These kernels have no tile but a length."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    BLOCK_R: int = 0
    num_warps: int = 4
    num_stages: int = 2


def cases(kernel: str, dtype: str, arch: int, reduced: bool) -> Iterator[Case]:
    """Every storage of momentum in all the ways to call it; reduced, the heaviest."""
    if dtype == "tfloat32":
        return
    from fastlora.ops.sign_momentum.triton import BLOCK, ROW, constants

    own = _NAMES[dtype]
    by_row = ("starts_ptr", "row_rates_ptr", "masks_ptr")
    absent = (*by_row, "skip_ptr", "lost_ptr", "centers_ptr", "keys_ptr")
    flags: list[Flags] = []
    if kernel == "sign_survey":
        made = {"P_TYPE": own, "G_TYPE": own, "ALIGNED": True, "BLOCK": BLOCK}
        flags.append(Flags("both", made, (), ()))
    elif kernel == "sign_finish":
        flags.append(Flags("both", {"HAS_SUMS": True, "HAS_FINITE": True}, (), ()))
    elif kernel == "sign_rows":
        flags.append(Flags("rows", {"P_TYPE": own, "ROW": ROW}, (), ()))
    else:
        rounds = own == "bf16"
        for momentum in ("q8", "bf16", "fp32"):
            rows = constants(
                own, own, momentum, shrinks=True, random=rounds, by_row=True, masked=True,
                masks_momentum=True,
            )  # fmt: skip
            flags.append(Flags(f"{momentum}, rows", rows, ("skip_ptr",), ()))
            everything = constants(own, own, momentum, shrinks=True, random=rounds)
            flags.append(Flags(f"{momentum}, all", everything, ("skip_ptr", *by_row), ()))
            flags.append(Flags(momentum, constants(own, own, momentum), absent, ()))
            fold = constants("", own, momentum, moves=False)
            flags.append(Flags(f"{momentum}, fold", fold, (*absent, "rates_ptr"), ()))
            masked = constants("", own, momentum, moves=False, masked=True, masks_momentum=True)
            others = tuple(name for name in absent if name != "masks_ptr")
            flags.append(Flags(f"{momentum}, fold rows", masked, (*others, "rates_ptr"), ()))
    facts = arch_of(arch, sm_count=128)
    for flag in flags[:1] if reduced else flags:
        yield Case(
            kernel,
            "fastlora.ops.sign_momentum.triton",
            f"sign_momentum_{kernel.removeprefix('sign_')}_kernel",
            dtype,
            arch,
            facts.shared_bytes,
            8192,  # what reductions and changes of layout take, at most
            Launch(),
            flag,
            "all 16",
            (),
            {},
            _POINTERS,
            False,
            _FLOATS,
            {"enable_fp_fusion": False},
        )
