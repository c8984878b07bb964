"""Which tile a call of the Triton backend uses: plain Python, without a GPU.

A pure function of (dtype, N, K, r, architecture facts); ``slots`` lists every tile that can ever be
chosen, so that ``bench/compile_matrix.py`` can compile each. The sizes are expectations from the
byte counts in the README, not measurements.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from fastlora.ops.adapter_linear.tiles import (
    INTERPRETER_CAPABILITY,
    Arch,
    Tile,
    cdiv,
    measured_tile,
)

KERNELS = ("rows", "finish")

_ANY = 1 << 30  # a rank class without an upper end

# Small, and different from each other, so that every loop and every mask takes part in a test.
_INTERPRETED = {
    "rows": {
        ("any", 16): Tile(BLOCK_N=16, BLOCK_K=64, BLOCK_R=16),
        ("any", _ANY): Tile(BLOCK_N=16, BLOCK_K=32, BLOCK_R=32),
    },
    "finish": {("any", _ANY): Tile(BLOCK_N=16, BLOCK_K=32, BLOCK_R=16)},
}

# "irregular" serves operands that cannot be read 16 bytes at a time (see ``choose``).
_HALF = {
    "rows": {
        ("any", 16): Tile(BLOCK_N=32, BLOCK_K=128, BLOCK_R=16, num_stages=4),
        ("any", 64): Tile(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8),
        ("any", _ANY): Tile(BLOCK_N=128, BLOCK_K=128, BLOCK_R=32, num_warps=8),
        ("irregular", 16): Tile(BLOCK_N=16, BLOCK_K=64, BLOCK_R=16),
        ("irregular", _ANY): Tile(BLOCK_N=32, BLOCK_K=64, BLOCK_R=32),
    },
    "finish": {("any", _ANY): Tile(BLOCK_N=16, BLOCK_K=128, BLOCK_R=16, num_stages=1)},
}

# Without tensor cores ("ieee") a dot is unrolled into FMAs: small blocks, or registers run out.
_FP32 = {
    "rows": {
        ("any", 16): Tile(BLOCK_N=64, BLOCK_K=32, BLOCK_R=16),
        ("any", _ANY): Tile(BLOCK_N=64, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=2),
        ("irregular", _ANY): Tile(BLOCK_N=32, BLOCK_K=16, BLOCK_R=16, num_stages=2),
    },
    # with 128 columns of a transposed W and a rank of 8, sm_80 spilled
    "finish": {("any", _ANY): Tile(BLOCK_N=16, BLOCK_K=64, BLOCK_R=16, num_stages=1)},
}


def slots(kernel: str, dtype: torch.dtype, arch: Arch) -> dict[tuple[str, int], Tile]:
    """The candidates by what they serve: (class of the call, largest rank of the class) -> Tile."""
    return _slots(kernel, dtype.itemsize == 2, arch.capability)


@cache
def _slots(kernel: str, half: bool, capability: int) -> dict[tuple[str, int], Tile]:
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; the kernels are {', '.join(KERNELS)}")
    if capability == INTERPRETER_CAPABILITY:
        return _INTERPRETED[kernel]
    return (_HALF if half else _FP32)[kernel]


def candidates(kernel: str, dtype: torch.dtype, arch: Arch) -> tuple[Tile, ...]:
    """Every tile ``choose`` can return for this kernel, dtype and architecture."""
    return tuple(slots(kernel, dtype, arch).values())


def choose(kernel: str, dtype: torch.dtype, r: int, arch: Arch, regular: bool = True) -> Tile:
    """The tile of one kernel.

    ``regular``: W and A can be read 16 bytes at a time, that is, one stride is 1, the other and
    the sizes are multiples of 16, the address is one of 16 bytes.
    """
    return _choose(kernel, dtype, r, arch, regular)


@lru_cache(maxsize=1024)
def _choose(kernel: str, dtype: torch.dtype, r: int, arch: Arch, regular: bool) -> Tile:
    if regular:
        tiles = candidates(kernel, dtype, arch)
        if measured := measured_tile(arch, "weight_norm", kernel, dtype, (1, 1, 1, r), tiles):
            return measured
    found = _slots(kernel, dtype.itemsize == 2, arch.capability)
    for name in ("any",) if regular else ("irregular", "any"):
        ranks = [rank for (slot, rank) in found if slot == name and r <= rank]
        if ranks:
            return found[name, min(ranks)]
    raise AssertionError(f"no tile for {kernel} at r={r} on {arch}")


def one_rank_tile(tile: Tile, r: int) -> bool:
    """Whether B's tile holds all ranks and is loaded once, rather than once per tile of W."""
    return r <= tile.BLOCK_R


def splits(tile: Tile, N: int, K: int, arch: Arch) -> tuple[int, int]:
    """(splits, BLOCK_K steps a split) of the sum over K: four programs a multiprocessor."""
    steps = max(cdiv(K, tile.BLOCK_K), 1)
    wanted = cdiv(4 * arch.sm_count, max(cdiv(N, tile.BLOCK_N), 1))
    # a split of fewer than four steps would spend its time on filling the pipeline
    per_split = cdiv(steps, max(1, min(wanted, steps // 4)))
    return cdiv(steps, per_split), per_split


def shared_bytes(
    kernel: str, tile: Tile, dtype: torch.dtype, arch: Arch, one_rank: bool | None = None
) -> int:
    """An upper bound of the shared memory a block takes, in the form that ``one_rank`` names.

    With None, the larger of the two forms of ``rows`` (see ``one_rank_tile``).
    """
    size = dtype.itemsize
    # asynchronous matrix units keep a buffer that the older ones free by copying to registers
    buffers = max(tile.num_stages - (arch.capability not in (90, 100)), 1)
    n, k, r = tile.BLOCK_N, tile.BLOCK_K, tile.BLOCK_R
    if kernel == "rows":
        # all ranks at once: W and A are streamed, B stays; else A and B are streamed, W stays
        forms = {
            True: buffers * (n * k + k * r) + n * r,
            False: buffers * (k * r + n * r) + n * k,
        }
        return size * (max(forms.values()) if one_rank is None else forms[one_rank])
    if kernel == "finish":
        return (n * k + n * r + k) * 8
    raise ValueError(f"unknown kernel {kernel!r}; the kernels are {', '.join(KERNELS)}")
