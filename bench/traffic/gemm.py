"""What a tile choice makes the GEMM ``main`` move: a model of its re-reads through the L2 cache.

out [M, N] = t b + x w, as adapter_linear_main_kernel walks over it: tiles in groups of GROUP_M
rows, as many at a time as the multiprocessors hold, each step an x tile and a w tile, all in step.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from bench.cards import Card
from bench.traffic.cache import Cache, in_turns
from fastlora.ops.adapter_linear import tiles

Step = tuple[Hashable, int, bool]  # which tile, its bytes, whether it is stored


@dataclass(frozen=True)
class Gemm:
    """out [m, n] = t [m, r] b [r, n] + x [m, k] w [k, n]."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * (self.k + self.r)

    @property
    def floor(self) -> int:
        """Bytes, every operand once."""
        elements = self.m * (self.k + self.r + self.n) + self.n * (self.k + self.r)
        return elements * self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """What one tile choice comes to. ``filled``: of the multiprocessors' slots over all waves."""

    moved: int
    filled: float
    seconds: float


def resident(tile: tiles.Tile, dtype: torch.dtype, card: Card) -> int:
    """Programs at a time: by shared memory and by 128 registers a thread."""
    arch = card.arch
    shared = max(tiles.shared_bytes("main", tile, dtype, arch), 1)
    by_registers = max(65536 // (128 * 32 * tile.num_warps), 1)
    return card.sm_count * max(min(arch.shared_bytes // shared, by_registers), 1)


def place(pid: int, tiles_m: int, tiles_n: int, group_m: int) -> tuple[int, int]:
    """(row tile, column tile) of a program: the kernel's own order."""
    group = pid // (group_m * tiles_n)
    rows = min(tiles_m - group * group_m, group_m)
    within = pid % (group_m * tiles_n)
    return group * group_m + within % rows, within // rows


def program(one: Gemm, tile: tiles.Tile, row: int, column: int) -> list[Step]:
    """The tiles a program touches, in order."""
    size = one.dtype.itemsize
    height = min(tile.BLOCK_M, one.m - row * tile.BLOCK_M) * size
    width = min(tile.BLOCK_N, one.n - column * tile.BLOCK_N)
    steps: list[Step] = []
    for step in range(tiles.cdiv(one.r, tile.BLOCK_R)):
        deep = min(tile.BLOCK_R, one.r - step * tile.BLOCK_R)
        steps.append((("t", row, step), height * deep, False))
        steps.append((("b", column, step), width * deep * size, False))
    for step in range(tiles.cdiv(one.k, tile.BLOCK_K)):
        deep = min(tile.BLOCK_K, one.k - step * tile.BLOCK_K)
        steps.append((("x", row, step), height * deep, False))
        steps.append((("w", column, step), width * deep * size, False))
    steps.append((("out", row, column), height * width, True))
    return steps


def cost(one: Gemm, tile: tiles.Tile, card: Card, at_a_time: int | None = None) -> Cost:
    """Bytes from and to memory, and the time below which that and the flops keep it."""
    tiles_m, tiles_n = tiles.cdiv(one.m, tile.BLOCK_M), tiles.cdiv(one.n, tile.BLOCK_N)
    count = tiles_m * tiles_n
    slots = at_a_time or resident(tile, one.dtype, card)
    cache = Cache(card.l2_bytes)
    order = (place(pid, tiles_m, tiles_n, tile.GROUP_M) for pid in range(count))
    programs = [program(one, tile, row, column) for row, column in order]
    for key, size, is_store in in_turns(programs, slots):
        cache.touch(key, size, is_store)
    cache.flush()
    filled = count / (tiles.cdiv(count, slots) * slots)
    seconds = max(one.flops / card.roof.flops_per_s / filled, cache.moved / card.roof.bytes_per_s)
    return Cost(cache.moved, filled, seconds)
