"""The two kernels of ``weight_norm``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.compile_cases.case import Case, Flags, alignments, area
from fastlora.ops.adapter_linear.tiles import arch_of
from fastlora.ops.weight_norm import tiles
from fastlora.ops.weight_norm.contract import CANCELLATION, FLOOR

KERNELS = tiles.KERNELS

FUNCTIONS = {"rows": "weight_norm_fwd_rows_kernel", "finish": "weight_norm_fwd_finish_kernel"}

# a weight as Linear keeps it, and as Conv1D and Embedding do
_LAYOUTS = (
    Flags("rows", {}, (), ("stride_wk", "stride_ak", "stride_br"), ("stride_bn",)),
    Flags("columns", {}, (), ("stride_wn", "stride_ak", "stride_br"), ("stride_bn",)),
)
_POINTERS = dict.fromkeys(("sums_ptr", "ranks_ptr", "out_ptr"), "fp32")


def cases(kernel: str, dtype: str, arch: int, reduced: bool) -> Iterator[Case]:
    """Every tile in every form and layout; reduced, the largest in its first."""
    if dtype == "tfloat32":  # norms are never made with a shorter mantissa
        return
    facts = arch_of(arch, sm_count=128)
    element = getattr(torch, dtype)
    slots = tiles.slots(kernel, element, facts)
    largest = max(slots, key=lambda slot: area(slots[slot]))
    for slot, tile in slots.items():
        if reduced and slot != largest:
            continue
        for form, one_rank in _forms(kernel, slot, slots):
            for layout in _LAYOUTS:
                flags = Flags(
                    f"{layout.name}{form}", {}, (), layout.unit_strides, layout.rank_strides
                )
                for alignment, unaligned in alignments(slot, slots, flags):
                    yield Case(
                        kernel,
                        "fastlora.ops.weight_norm.triton",
                        FUNCTIONS[kernel],
                        dtype,
                        arch,
                        facts.shared_bytes,
                        tiles.shared_bytes(kernel, tile, element, facts, one_rank),
                        tile,
                        flags,
                        alignment,
                        unaligned,
                        {
                            "ONE_RANK_TILE": one_rank,
                            "STAGES": tile.num_stages,
                            "CANCELLATION": CANCELLATION,
                            "FLOOR": FLOOR,
                        },
                        _POINTERS,
                        kernel == "rows",
                    )
                    if reduced:
                        return


def _forms(
    kernel: str, slot: tuple[str, int], slots: dict[tuple[str, int], tiles.Tile]
) -> Iterator[tuple[str, bool]]:
    """(name, ONE_RANK_TILE) of the forms in which ``rows`` runs at the ranks of a slot."""
    if kernel == "finish":  # has but one
        yield "", True
        return
    size, rank = slot
    lowest = 1 + max((other for name, other in slots if name == size and other < rank), default=0)
    if rank > slots[slot].BLOCK_R:
        yield ", many ranks", False
    if tiles.one_rank_tile(slots[slot], lowest):
        yield ", few ranks", True
