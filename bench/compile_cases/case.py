"""One way to launch a kernel, as the compile matrix compiles it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Flags:
    """One way to call a kernel: its constants, what it goes without, its layout."""

    name: str
    constants: dict[str, Any]
    absent: tuple[str, ...]  # arguments that are None: pointers, and the strides of those
    unit_strides: tuple[str, ...]
    rank_strides: tuple[str, ...] = ()  # those that equal the rank in contiguous operands


@dataclass(frozen=True)
class Case:
    """One thing to compile; ``unaligned`` names the sizes and strides that 16 does not divide."""

    kernel: str
    module: str  # where the function is
    function: str
    dtype: str
    arch: int
    limit: int  # bytes of shared memory a block may have
    estimate: int  # bytes that the operation's tiles.shared_bytes expects
    tile: Any
    flags: Flags
    alignment: str
    unaligned: tuple[str, ...]  # ("*",) for all
    constants: dict[str, Any] = field(default_factory=dict)  # beside those of tile and flags
    pointers: dict[str, str] = field(default_factory=dict)  # element types other than dtype
    multiplies: bool = True  # matrices, for which half precision must use tensor cores
    floats: tuple[str, ...] = ()  # arguments that are no integers
    options: dict[str, Any] = field(default_factory=dict)  # of the compiler, beside the tile's


def alignments(
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
    if all(name != "irregular" for name, _ in slots):  # then this tile serves such operands too
        yield "irregular", ("*",)


def area(tile: Any) -> int:
    """Elements of a tile's operands and result, to tell the largest."""
    sides = [s for s in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.BLOCK_R) if s]
    return sum(a * b for i, a in enumerate(sides) for b in sides[i + 1 :])
