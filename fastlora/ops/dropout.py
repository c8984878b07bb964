"""Dropout that is drawn again instead of stored: every mask here is a pure function of a seed.

A mask element is kept when a 16-bit draw reaches a threshold, so the probability is quantised to
1/65536 (p = 0.1 becomes 0.100006) and the scale 1/(1-p) uses the quantised value: the expectation
stays exact. Two sources of draws exist, because each is the fast one where it is used:

* ``stream_keep``: torch's own generator, four elements a 64-bit draw (the PyTorch backends).
* ``philox_keep``: Philox4x32-7 indexed by position, eight elements a call. The Triton kernels
  compute the same function tile by tile, and csrc/cpu/dropout.cpp row by row; this plain version
  is their specification.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEVELS = 1 << 16
_LOW = 0xFFFFFFFF

Mask = Callable[[Tensor], Tensor]  # x [M, K] where it keeps it and 0 elsewhere, not rescaled
# The Mask of (shape, p, seed, device), drawn once for all calls
Draw = Callable[[tuple[int, int], float, Tensor, torch.device], Mask]
PHILOX_ROUNDS = 7
PHILOX_GROUP = 8  # columns that share one Philox call: four 32-bit words, two halves each


def threshold(p: float) -> int:
    """How many 16-bit levels drop: round(p * 65536), at most 65535 so that some are kept."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """1 / (1 - p) for the p that ``threshold`` realises."""
    return LEVELS / (LEVELS - threshold(p))


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A seed [] int64 on ``device`` from that device's default generator.

    Taken from torch's generator so that ``manual_seed`` reproduces it and gradient checkpointing,
    which restores the generator before it recomputes, replays the same mask.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def stream_noise(shape: tuple[int, int], seed: Tensor, device: torch.device) -> Tensor:
    """Uniform int16 noise of ``shape`` from a generator seeded with ``seed`` (a CPU tensor)."""
    generator = torch.Generator(device=device).manual_seed(int(seed))
    count = shape[0] * shape[1]
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(shape)


def drop(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """x where ``noise`` keeps it and 0 elsewhere, not rescaled. x [M, K] float, noise [M, K] int16.

    The comparison runs in x's dtype where that holds every int16 exactly, because
    ``threshold_backward`` is the one PyTorch op that compares and selects in a single vectorised
    pass (a bool mask times a float tensor takes 3 to 5 times as long on a CPU).
    """
    level = threshold(p) - LEVELS // 2
    if x.dtype in (torch.float32, torch.float64):
        return torch.ops.aten.threshold_backward(x, noise.to(x.dtype), level - 1)
    return x.masked_fill(noise < level, 0)


def stream_mask(shape: tuple[int, int], p: float, seed: Tensor, device: torch.device) -> Mask:
    """The mask of ``stream_keep``: two bytes an element as long as it lives."""
    noise = stream_noise(shape, seed, device)
    return lambda x: drop(x, noise, p)


def stream_keep(shape: tuple[int, int], p: float, seed: Tensor, device: torch.device) -> Tensor:
    """The bool mask [M, K] that ``drop(·, stream_noise(...), p)`` applies; for tests and tools."""
    return stream_noise(shape, seed, device) >= threshold(p) - LEVELS // 2


def philox_keep(shape: tuple[int, int], p: float, seed: Tensor) -> Tensor:
    """The bool mask [M, K] of the Triton kernels, computed in plain int64 arithmetic.

    Element (m, k) takes call number m * ceil(K/8) + k // 8 of Philox4x32-7 (Salmon et al., 2011;
    key = the seed's low and high words, counter = the call number's low and high words, 0, 0);
    lane k % 8 is word (k % 8) // 2, its low half first.
    """
    rows, cols = shape
    groups = -(-cols // PHILOX_GROUP)
    call = torch.arange(rows * groups, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(call)
    key = int(seed)
    words = philox(call & _LOW, (call >> 32) & _LOW, zero, zero, key & _LOW, (key >> 32) & _LOW)
    pairs = torch.stack(words, dim=-1)
    halves = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=-1)
    draws = halves.view(rows, groups * PHILOX_GROUP)[:, :cols]
    return draws >= threshold(p)


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of a 128-bit counter and a 64-bit key, as 32-bit words held in int64."""
    for _ in range(PHILOX_ROUNDS):
        low_a, high_a = _mul32(c0, 0xD2511F53)
        low_b, high_b = _mul32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _mul32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Low and high 32-bit words of the product of 32-bit numbers held in int64."""
    # a * b needs 64 unsigned bits; two 16-bit halves of b keep every partial product below 2**49
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    carry = (low >> 16) + high
    return ((carry << 16) | (low & 0xFFFF)) & _LOW, (carry >> 16) & _LOW
