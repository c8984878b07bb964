"""Which tile and which algorithm a call of the Triton backend uses: plain Python, without a GPU.

Every choice is a pure function of (dtype, M, N, K, r, architecture facts). ``candidates`` lists
all tiles that can ever be chosen, so that ``bench/compile_matrix.py`` can compile each. M only
enters rounded up to a power of two: the choice is cached, and two sequence lengths of one bucket
never compile two kernels.

What was measured on a device (``fastlora.ops.tuned``) comes before these choices, which are
*unmeasured* expectations: of the algorithm, and of the tile among the candidates of its kernel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

import torch

from fastlora.ops import tuned

KERNELS = (
    *("shrink", "main", "seed", "bwd_dy", "bwd_da", "sum"),
    # with an out_scale: main, bwd_dy; and the two kernels that only such calls have
    *("main_scaled", "bwd_dots", "bwd_dg", "drop"),
)
PARTS = ("forward", "dx")
ALGORITHMS = ("fused", "accumulate")

_KIB = 1024
# KiB of shared memory a block may use (CUDA programming guide, table of compute capabilities)
_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
INTERPRETER_CAPABILITY = 0


@dataclass(frozen=True)
class Tile:
    """Block sizes of one kernel (0 where it has no such dimension) and how it is launched."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    BLOCK_R: int = 0
    num_warps: int = 4
    num_stages: int = 3
    GROUP_M: int = 8


@dataclass(frozen=True)
class Arch:
    """What a choice may depend on. capability: 80, 86, 89, 90, 100 or 120 (0: the interpreter)."""

    capability: int
    sm_count: int
    shared_bytes: int
    device: str = ""  # the name a measured table is looked up by


INTERPRETER = Arch(INTERPRETER_CAPABILITY, sm_count=4, shared_bytes=99 * _KIB)


def arch_of(capability: int, sm_count: int, device: str = "") -> Arch:
    """The known architecture a card of ``capability`` (10 * major + minor) is treated as.

    An unknown one takes the nearest lower known one (87 -> 86, 103 -> 100), whose instructions and
    limits it has at least; anything below 80 is refused, because the tiles assume its tensor cores.
    """
    known = [c for c in _SHARED if c <= capability]
    if not known:
        raise ValueError(
            f"compute capability {capability / 10:.1f} is below 8.0, the lowest with tiles here"
        )
    return Arch(max(known), sm_count, _SHARED[max(known)] * _KIB, device)


# ------------------------------------------------------------------------------------- candidates


def candidates(kernel: str, dtype: torch.dtype, arch: Arch) -> tuple[Tile, ...]:
    """Every tile ``choose`` can return for this kernel, dtype and architecture."""
    return tuple(slots(kernel, dtype, arch).values())


def slots(kernel: str, dtype: torch.dtype, arch: Arch) -> dict[tuple[str, int], Tile]:
    """The candidates by what they serve: (class of the call, largest rank of the class) -> Tile."""
    return _slots(kernel, dtype.itemsize == 2, arch.capability)


@cache
def _slots(kernel: str, half: bool, capability: int) -> dict[tuple[str, int], Tile]:
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; the kernels are {', '.join(KERNELS)}")
    if capability == INTERPRETER_CAPABILITY:
        return _INTERPRETED[kernel]
    if not half:
        return _FP32[kernel]
    if kernel == "main":
        return _HALF_MAIN[capability]
    if kernel == "main_scaled":
        return _HALF_SCALED[capability]
    return _HALF[kernel]


_ANY = 1 << 30  # a rank class without an upper end

# Small, and different from each other, so that every loop and every mask takes part in a test.
_INTERPRETED = {
    "shrink": {("any", _ANY): Tile(BLOCK_M=32, BLOCK_K=16, BLOCK_R=32)},
    "main": {("any", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, GROUP_M=2)},
    "seed": {("any", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, GROUP_M=2)},
    "bwd_dy": {("any", _ANY): Tile(BLOCK_M=16, BLOCK_N=32, BLOCK_R=32)},
    "bwd_da": {("any", _ANY): Tile(BLOCK_M=16, BLOCK_K=32, BLOCK_R=32)},
    "main_scaled": {("any", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, GROUP_M=2)},
    "bwd_dots": {("any", _ANY): Tile(BLOCK_M=16, BLOCK_N=32, BLOCK_R=32)},
    "bwd_dg": {("any", _ANY): Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32)},
    "drop": {("any", _ANY): Tile(BLOCK_M=32, BLOCK_K=32)},
    "sum": {("any", _ANY): Tile(BLOCK_M=4, BLOCK_N=256)},
}

_DROP = {
    ("any", _ANY): Tile(BLOCK_M=16, BLOCK_K=256, num_stages=1),
    ("irregular", _ANY): Tile(BLOCK_M=16, BLOCK_K=64, num_stages=1),
}
_SUM = {("any", _ANY): Tile(BLOCK_M=8, BLOCK_N=256, num_stages=1)}

# "irregular" serves operands that cannot be read 16 bytes at a time (see ``choose``): the compiler
# then holds an address for each element, which only small tiles have the registers for.

# The skinny kernels wait for memory: deep tiles along the contiguous dimension, few registers.
_HALF = {
    "shrink": {
        ("small", 16): Tile(BLOCK_M=16, BLOCK_K=128, BLOCK_R=16, num_stages=4),
        ("small", _ANY): Tile(BLOCK_M=16, BLOCK_K=64, BLOCK_R=64, num_stages=4),
        ("any", 16): Tile(BLOCK_M=64, BLOCK_K=128, BLOCK_R=16),
        ("any", 64): Tile(BLOCK_M=64, BLOCK_K=64, BLOCK_R=64),
        ("any", _ANY): Tile(BLOCK_M=64, BLOCK_K=64, BLOCK_R=128, num_warps=8),
        ("irregular", _ANY): Tile(BLOCK_M=32, BLOCK_K=64, BLOCK_R=32),
    },
    "seed": {
        ("any", 16): Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, BLOCK_R=16, num_stages=1),
        ("any", _ANY): Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, BLOCK_R=64, num_stages=1),
        ("irregular", _ANY): Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=16, num_stages=1),
    },
    "bwd_dy": {
        ("small", 16): Tile(BLOCK_M=16, BLOCK_N=256, BLOCK_R=16),
        ("small", _ANY): Tile(BLOCK_M=16, BLOCK_N=128, BLOCK_R=64),
        ("any", 16): Tile(BLOCK_M=64, BLOCK_N=256, BLOCK_R=16, num_warps=8),
        ("any", _ANY): Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8),
        ("irregular", _ANY): Tile(BLOCK_M=32, BLOCK_N=64, BLOCK_R=32),
    },
    "bwd_da": {
        ("small", 16): Tile(BLOCK_M=16, BLOCK_K=256, BLOCK_R=16),
        ("small", _ANY): Tile(BLOCK_M=16, BLOCK_K=128, BLOCK_R=64),
        # narrow: rows are cut into chunks, each with its partial dA, until programs fill the card
        ("any", 16): Tile(BLOCK_M=128, BLOCK_K=64, BLOCK_R=16),
        ("any", _ANY): Tile(BLOCK_M=64, BLOCK_K=128, BLOCK_R=64, num_warps=8),
        ("irregular", _ANY): Tile(BLOCK_M=32, BLOCK_K=64, BLOCK_R=32),
    },
    "bwd_dg": {
        ("any", _ANY): Tile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=64),
        ("irregular", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
    },
    "drop": _DROP,
    "sum": _SUM,
}


_HALF["bwd_dots"] = _HALF["bwd_dy"]  # the same kernel; in fp32 reading y takes a smaller tile


def _mains(
    block_k: int, big_stages: int, stages: int, small_stages: int
) -> dict[tuple[str, int], Tile]:
    """The four sizes of the GEMM tile; where M and N fill the card, one variant for low ranks."""
    big = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=block_k, num_warps=8, num_stages=big_stages)
    mid = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=block_k, num_warps=8, num_stages=stages)
    low = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=small_stages)
    return {
        ("small", _ANY): Tile(
            BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, BLOCK_R=32, num_stages=small_stages
        ),
        ("low", _ANY): Tile(**low, BLOCK_R=16),
        ("mid", _ANY): Tile(**mid, BLOCK_R=32),
        ("big", 16): Tile(**big, BLOCK_R=16),
        ("big", _ANY): Tile(**big, BLOCK_R=32),
        ("irregular", _ANY): Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=32),
    }


_HALF_MAIN = {
    80: _mains(block_k=32, big_stages=4, stages=4, small_stages=4),
    86: _mains(block_k=32, big_stages=3, stages=4, small_stages=4),
    89: _mains(block_k=32, big_stages=3, stages=4, small_stages=4),
    90: _mains(block_k=64, big_stages=4, stages=4, small_stages=4),
    100: _mains(block_k=64, big_stages=4, stages=4, small_stages=4),
    120: _mains(block_k=32, big_stages=3, stages=4, small_stages=4),
}

# On sm_100 a thread ends with whole rows of the result, and with a scale and a bias for each of
# their elements: too many registers in the largest tile. The small one spilled with BLOCK_R = 16.
_SCALED_100 = {slot: tile for slot, tile in _HALF_MAIN[100].items() if slot[0] != "big"}
_SCALED_100["big", _ANY] = _SCALED_100["mid", _ANY]
_SCALED_100["low", _ANY] = replace(_SCALED_100["low", _ANY], BLOCK_R=32)
_HALF_SCALED = _HALF_MAIN | {100: _SCALED_100}

# Without tensor cores ("ieee") a dot is unrolled into FMAs: small blocks, or registers run out.
_FP32 = {
    "shrink": {
        ("small", _ANY): Tile(BLOCK_M=16, BLOCK_K=32, BLOCK_R=16),
        ("any", 16): Tile(BLOCK_M=64, BLOCK_K=32, BLOCK_R=16),
        ("any", _ANY): Tile(BLOCK_M=32, BLOCK_K=32, BLOCK_R=64),
        ("irregular", _ANY): Tile(BLOCK_M=16, BLOCK_K=32, BLOCK_R=16),
    },
    "main": {
        ("small", _ANY): Tile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=16),
        ("any", _ANY): Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, BLOCK_R=16, num_warps=8),
        ("irregular", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, BLOCK_R=16),
    },
    "seed": {
        ("any", _ANY): Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, BLOCK_R=16, num_stages=1),
        ("irregular", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, BLOCK_R=16, num_stages=1),
    },
    "bwd_dy": {
        ("any", 16): Tile(BLOCK_M=32, BLOCK_N=64, BLOCK_R=16),
        ("any", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_R=32),
        ("irregular", _ANY): Tile(BLOCK_M=16, BLOCK_N=32, BLOCK_R=16),
    },
    "bwd_da": {
        ("any", 16): Tile(BLOCK_M=32, BLOCK_K=64, BLOCK_R=16),
        ("any", _ANY): Tile(BLOCK_M=32, BLOCK_K=64, BLOCK_R=32, num_warps=8),
        ("irregular", _ANY): Tile(BLOCK_M=32, BLOCK_K=32, BLOCK_R=16),
    },
    "bwd_dots": {
        ("any", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16),
        ("irregular", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16),
    },
    "bwd_dg": {
        ("any", _ANY): Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
        ("irregular", _ANY): Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32),
    },
    "drop": _DROP,
    "sum": _SUM,
}


_FP32["main_scaled"] = _FP32["main"]


def shared_bytes(kernel: str, tile: Tile, dtype: torch.dtype, arch: Arch) -> int:
    """An estimate of the shared memory a block takes; the compiler's figure is at most that.

    The compiler reuses one region after another, so the largest phase counts, not the sum: the
    rank-r product, the pipelined loop, the result on its way out. ``bench/compile_matrix.py``
    holds it against the compiler.
    """
    size = dtype.itemsize
    m, n, k, r = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.BLOCK_R
    # asynchronous matrix units read a stage from shared memory while the next ones arrive; the
    # older ones first copy it to registers, which frees a buffer
    buffers = max(tile.num_stages - (arch.capability not in (90, 100)), 1)
    if kernel in ("main", "main_scaled"):
        loop = buffers * (m * k + k * n) * size
        if kernel == "main_scaled":  # a stage brings the scale of k elements, in fp32
            loop += buffers * k * 4
            if size == 4:  # and what it has scaled goes back to be multiplied
                loop += m * k * size
        return max(loop, (m * r + r * n) * size, m * n * size)
    if kernel == "seed":
        return max((m * r + r * n) * size, m * n * size)
    if kernel == "shrink":  # x is masked in registers and goes back, at worst, to be multiplied
        return (buffers * (m * k + k * r) + m * k) * size
    if kernel in ("bwd_dy", "bwd_dots"):  # B stays; dY and t stream; H is stored in another layout
        sums = 4 * n * 4 if kernel == "bwd_dots" else 0  # of columns, over the warps
        return (buffers * (m * n + m * r) + n * r) * size + m * r * 4 + sums
    if kernel == "bwd_da":  # on sm_90 a block of 16 rows was seen to take what one of 32 does
        return (buffers * (k + r) + k) * max(m, 32) * size
    if kernel == "bwd_dg":  # the sum over k of what was multiplied goes through one more region
        return max(buffers * (m * n + m * k) * size, n * k * 4)
    if kernel == "drop":  # the mask's draws may change their layout on the way
        return m * k * 4
    if kernel == "sum":
        return m * n * 4
    raise ValueError(f"unknown kernel {kernel!r}; the kernels are {', '.join(KERNELS)}")


# ------------------------------------------------------------------------------------------ choice


def cdiv(a: int, b: int) -> int:
    """ceil(a / b) for integers."""
    return -(-a // b)


def bucket(m: int) -> int:
    """M rounded up to a power of two (at least 1)."""
    return 1 << max(m - 1, 0).bit_length()


def choose(
    kernel: str,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    r: int,
    arch: Arch,
    regular: bool = True,
) -> Tile:
    """The tile for one kernel. For "main…" and "seed" N is the output's width, K the reduction.

    ``regular``: every operand can be read 16 bytes at a time, that is, one stride is 1, the other
    and the sizes are multiples of 16, the address is one of 16 bytes (the unit in which Triton
    specialises). The rank's own stride may be anything up to rank 16.
    """
    return _choose(kernel, dtype, bucket(M), N, K, r, arch, regular)


@lru_cache(maxsize=4096)
def _choose(
    kernel: str, dtype: torch.dtype, M: int, N: int, K: int, r: int, arch: Arch, regular: bool
) -> Tile:
    if regular:
        found = candidates(kernel, dtype, arch)
        if measured := measured_tile(arch, "adapter_linear", kernel, dtype, (M, N, K, r), found):
            return measured
    slots = _slots(kernel, dtype.itemsize == 2, arch.capability)
    size = "irregular" if not regular else "small" if M <= 16 else "any"
    if kernel in ("main", "main_scaled") and size == "any":
        # the largest tile that still gives nearly every multiprocessor a program
        def fills(columns: int) -> bool:
            return M >= 128 and cdiv(M, 128) * cdiv(N, columns) * 10 >= arch.sm_count * 9

        size = "big" if fills(256) else "mid" if fills(128) else "low"
    for name in (size, "any"):
        ranks = [rank for (slot, rank) in slots if slot == name and r <= rank]
        if ranks:
            return slots[name, min(ranks)]
    raise AssertionError(f"no tile for {kernel} at M={M}, N={N}, r={r} on {arch}")


def measured_tile(
    arch: Arch,
    operation: str,
    kernel: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    found: tuple[Tile, ...],
) -> Tile | None:
    """That of ``found`` which was the fastest on this device, if any was measured near ``sizes``.

    A tile that is no candidate any more is not taken: only those are known to compile.
    """
    take = tuned.choice(arch.device, operation, f"tile {kernel}", name_of(dtype), sizes)
    if not isinstance(take, dict):
        return None
    return next((tile for tile in found if asdict(tile) == take), None)


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def shrink_splits(tile: Tile, M: int, K: int, r: int, arch: Arch) -> tuple[int, int]:
    """(splits, BLOCK_K steps a split) of x Aᵀ: K is cut where row tiles leave half the card idle.

    Whole steps, so that the eight columns of a Philox call are never parted.
    """
    steps = max(cdiv(K, tile.BLOCK_K), 1)
    programs = cdiv(M, tile.BLOCK_M) * cdiv(r, tile.BLOCK_R)
    splits = 1
    if 2 * programs <= arch.sm_count:
        # a split of one step would spend its time on filling the pipeline
        splits = max(1, min(arch.sm_count // programs, steps // 2))
    per_split = cdiv(steps, splits)
    return cdiv(steps, per_split), per_split


def row_chunks(block_m: int, M: int, tiles: int, arch: Arch) -> tuple[int, int]:
    """(chunks, rows a chunk) of a reduction over M that ``tiles`` programs share per chunk.

    Two programs a multiprocessor hide memory's latency; more only write more partial sums.
    """
    steps = cdiv(M, block_m)
    wanted = cdiv(2 * arch.sm_count, tiles)
    per_chunk = cdiv(steps, max(1, min(wanted, steps // 2)))
    return cdiv(steps, per_chunk), per_chunk * block_m


# --------------------------------------------------------------------------------------- algorithm


def algorithm(part: str, dtype: torch.dtype, M: int, N: int, K: int, r: int, arch: Arch) -> str:
    """ "fused" (one Triton GEMM seeded with the rank-r product) or "accumulate" (cuBLAS onto it).

    part: "forward" (y [M, N]) or "dx" (dx [M, K]).
    """
    return _algorithm(part, dtype, bucket(M), N, K, r, arch)


@lru_cache(maxsize=4096)
def _algorithm(part: str, dtype: torch.dtype, M: int, N: int, K: int, r: int, arch: Arch) -> str:
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}; the parts are {', '.join(PARTS)}")
    measured = tuned.choice(arch.device, "adapter_linear", part, name_of(dtype), (M, N, K, r))
    return str(measured) if measured in ALGORITHMS else _prior(dtype, M, N, K, arch)


def _prior(dtype: torch.dtype, M: int, N: int, K: int, arch: Arch) -> str:
    """Unmeasured. What speaks for it: see the README of this operation."""
    if arch.capability == INTERPRETER_CAPABILITY:
        return "fused"
    if dtype.itemsize != 2:
        return "accumulate"  # Triton's fp32 dot has no tensor cores and trails cuBLAS
    if arch.capability in (90, 100):
        # cuBLAS leads there by more than the saved pass is worth, except where launches dominate:
        # 2**32 multiply-adds take about 15 us on these cards
        return "fused" if M * N * K <= 2**32 else "accumulate"
    return "fused"
