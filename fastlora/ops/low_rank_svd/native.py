"""Block Lanczos in the native core: a matrix a thread, half the products of a subspace iteration.

It declines what it does not resolve (README, "Block Lanczos"), and leaves that to the eager form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.ops.backend import cpu_vendor
from fastlora.ops.library import core

# Columns that the kernels multiply at once, and of the widest block.
_GROUP, _WIDEST = 8, 32
# Blocks of the space that checks for repeated singular values.
_CHECKING = 2
# Blocks to q at most.
_MOST = 4
# The space's share of the smaller side beyond which a subspace iteration is no slower.
_SHARE = 0.5
# Block-wide runs of values that differ by less than this share are checked, and the check may raise
# a value by this share: noise grows by 2.6 % at most at niter 4, what lacks copies by 5 % and more.
_ALIKE, _GROWTH = 0.03, 0.03
# σ_q as a share of σ_1 down to which XᵀX resolves it in float32.
_LEAST = 1e-3
# And down to which a basis from products in bfloat16 may do (README); 1: nowhere.
# AMD's processors that have such products do twice as many a second; others were not measured.
_ROUNDED_LEAST = 0.1 if cpu_vendor() == "AuthenticAMD" else 1.0


class Plan(NamedTuple):
    """So many blocks, so wide, made from so many vectors at random, the first from Xᵀ or XᵀX of
    those."""

    width: int
    blocks: int
    left: bool
    starts: int


class Triples(NamedTuple):
    """U [n, N, q], S [n, q] float64, Vh [n, q, K], ‖X‖² [n] float64; what is not ``found`` [n]
    means nothing but ‖X‖²."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    squares: Tensor
    found: Tensor


def plan(n: int, k: int, q: int, niter: int, more: int) -> Plan | None:
    """For matrices [n, k], with ``more`` vectors than niter asks for; None where none fits."""
    width = min(-(-q // (2 * _GROUP)) * _GROUP, _WIDEST)
    share = max(1.0, q / width)
    # No more error than torch.svd_lowrank's niter leaves on the flattest spectra (README, "Block
    # Lanczos"): fitted to Gaussian matrices. With the narrowest blocks luck decides more.
    enough = 2 * share + 2 * (share * niter) ** 0.6 + (share % 1 > 0) / 2 + (width == _GROUP)
    passes = max(math.ceil(enough), 2 * -(-q // width))
    blocks = passes // 2 + -(-more // width)
    fits = (blocks + _CHECKING) * width <= _SHARE * min(n, k)
    left = passes % 2 == 0
    return Plan(width, blocks, left, 2 * width) if fits and q <= _MOST * width else None


def forward(
    x: list[Tensor],
    q: int,
    plan: Plan,
    start: Tensor,
    norms: tuple[float, float],
    isa: str = "",
    rounded_least: float = _ROUNDED_LEAST,
) -> Triples:
    """Of float32 matrices [N, K] of one shape, from ``start`` [plan.starts, max(N, K)] at random.

    ``norms``: between which it computes. For tests, ``isa``: one of the core's instruction sets;
    ``rounded_least``: in place of _ROUNDED_LEAST.
    """
    n, k = x[0].shape
    if x[0].stride(0) == 1 != x[0].stride(1) and k > 1 and _alike(x):
        turned = [m.t() for m in x]
        left, s, right, squares, found = forward(turned, q, plan, start, norms, isa, rounded_least)
        return Triples(right.mT.contiguous(), s, left.mT.contiguous(), squares, found)
    if not (x[0].stride(1) == 1 and x[0].stride(0) >= k and _alike(x)):
        x = [m.contiguous() for m in x]
    count = len(x)
    u, vh = start.new_empty(count, n, q), start.new_empty(count, q, k)
    s, squares, checked = (
        start.new_empty(shape, dtype=torch.float64) for shape in ((count, q), (count,), (count,))
    )
    found = start.new_empty(count, dtype=torch.uint8)
    core().block_lanczos(
        [m.data_ptr() for m in x], x[0].stride(0), n, k, plan.width, plan.blocks,
        start.data_ptr(), start.stride(0), plan.left, q, *norms, _ALIKE, _GROWTH, _LEAST,
        rounded_least, u.data_ptr(), s.data_ptr(), vh.data_ptr(), squares.data_ptr(),
        checked.data_ptr(), found.data_ptr(), torch.get_num_threads(), isa,
    )  # fmt: skip
    return Triples(u, s, vh, squares, found == 0)


def _alike(x: list[Tensor]) -> bool:
    return all(m.stride() == x[0].stride() for m in x)
