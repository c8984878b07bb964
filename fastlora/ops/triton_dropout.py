"""Dropout's keep mask inside a Triton kernel: the tile of ``fastlora.ops.dropout.philox_keep``.

Imports triton; only the ``triton.py`` files of the operations import this.
"""

from __future__ import annotations

import triton
import triton.language as tl

# the specification's constants (fastlora.ops.dropout), as kernels may only read constexpr globals
ROUNDS = tl.constexpr(7)
GROUP = tl.constexpr(8)


@triton.jit
def philox_keep_tile(seed, rows, column, columns, threshold, BLOCK: tl.constexpr):
    """Keep mask [BM, BLOCK] (int1) of rows ``rows`` [BM] int64 and columns column + [0, BLOCK).

    ``seed`` is an int64 scalar, ``column`` and BLOCK are multiples of 8, ``columns`` is the masked
    matrix's full width, ``threshold`` the int of ``fastlora.ops.dropout.threshold``.
    """
    groups = (columns + GROUP - 1) // GROUP
    own = column // GROUP + tl.arange(0, BLOCK // GROUP)
    call = rows[:, None] * groups + own[None, :]  # [BM, BLOCK/8] int64
    low = (call & 0xFFFFFFFF).to(tl.uint32)
    high = (call >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero, ROUNDS)
    # words in order along the row, [BM, BLOCK/2]; then the low half of each before its high half
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    draws = tl.interleave(words & 0xFFFF, words >> 16)
    return draws.to(tl.int32) >= threshold
