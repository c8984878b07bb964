"""Shifted subspace iteration over a stack, orthonormalised by Cholesky: plain PyTorch.

Only two products touch the matrices, ``X V`` and ``Xᵀ Q``; they are passed in (``Products``) so
that another GEMM library can be put under the same code (see onednn.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.ops.low_rank_svd import small

Matrices = Sequence[Tensor] | Tensor  # one shape and dtype

# Gram matrices rounded to the working precision may lose positive definiteness by about this many
# units of their trace; what is added to their diagonal before they are factorised.
_SHIFT = 8.0
# A basis counts as orthonormalised well enough for its last Cholesky pass when no element of
# QᵀQ - I exceeds this: the pass then leaves an error of a few units in the last place.
_NEARLY = 0.1
# What is this many times above its shift in a Gram matrix is untouched by it and by rounding.
_CLEAR = 64.0
# The iteration's shift as a share of λ_b: the last one's, the one's before it, and so on in turn.
_SHIFTS = (0.5, 0.4)


class Products(NamedTuple):
    """What is multiplied by the matrices of a stack.

    ``stacked(matrices, dtype)`` prepares what the two functions take from n matrices [N, K];
    ``times(x, v)`` is X V for v [n, K, b], ``transposed_times(x, q)`` is Xᵀ Q for q [n, N, b].
    """

    stacked: Callable[[Matrices, torch.dtype], Matrices]
    times: Callable[..., Tensor]
    transposed_times: Callable[..., Tensor]


def _stacked(matrices: Matrices, dtype: torch.dtype) -> Matrices:
    if not isinstance(matrices, Tensor):
        matrices = torch.stack(tuple(matrices))
    return matrices.detach().to(dtype)


ATEN = Products(_stacked, torch.matmul, lambda x, q: (q.mT @ x).mT)


def forward(
    x: Matrices,
    omega: Tensor,
    q: int,
    iterations: int,
    products: Products = ATEN,
    shifted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(U [n, N, q], S [n, q] float64, Vh [n, q, K]) of n matrices [N, K], N ≤ K.

    ``x`` as ``products.stacked`` made it, ``omega`` [n, K, b] with q ≤ b ≤ N. ``iterations`` of
    them take 2·iterations + 2 products with X or Xᵀ. They may be ``shifted`` where b exceeds q by
    so much that what is slow to converge near λ_b is not wanted.
    """
    y = products.times(x, omega)
    floor = torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)
    for left in reversed(range(iterations)):
        basis, _, _ = _near_orthonormal(y, rows=True)
        z = products.transposed_times(x, basis)
        v, whitener, shift = _near_orthonormal(z)
        y = products.times(x, v)
        if not shifted:
            continue
        # λ_b(XᵀX) is at least what the subspace shows of it (README, "The shift")
        least = small.smallest_eigenvalue(whitener) - shift
        floor = torch.maximum(floor, torch.where(least > _CLEAR * shift, least, 0.0))
        # with a gap behind λ_b, where little is gained any more, the tail needs no shift
        gained = (_squares(y) - _squares(z)).clamp_min(0.0)
        alpha = torch.minimum(floor * _SHIFTS[left % 2], gained)
        y.baddbmm_(basis, (whitener * -alpha[:, None, None]).to(y.dtype))
    basis = orthonormal(y)
    z = products.transposed_times(x, basis)  # X ≈ basis · zᵀ
    right = orthonormal(z)
    u, s, v = (t[..., :q] for t in small.svd((z.mT @ right).double()))
    return basis @ u.to(y.dtype), s, (right @ v.to(y.dtype)).mT


def factored(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U [n, N, p], S [n, p], Vh [n, p, K]) of left · rightᵀ, exactly, p = min(N, r, K).

    left [n, N, r], right [n, K, r], float64, of any rank.
    """
    u_basis, v_basis = orthonormal(left), orthonormal(right)
    u, s, v = small.svd((u_basis.mT @ left) @ (right.mT @ v_basis))
    return u_basis @ u, s, (v_basis @ v).mT


def orthonormal(y: Tensor) -> Tensor:
    """An orthonormal basis [..., M, min(M, b)] of a space that holds the columns of y [..., M, b].

    CholeskyQR twice, the first time shifted. Where that is not enough (columns dependent, or a
    condition beyond the square root of the precision) Householder QR, for these matrices alone.
    """
    if y.shape[-2] < y.shape[-1]:
        return torch.linalg.qr(y).Q
    first = y @ _whitener(y)[0].to(y.dtype)
    gram = (first.mT @ first).double()
    whitener, failed = small.whitening(gram)
    off = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs()
    failed |= ~(off.amax(dim=(-2, -1)) <= _NEARLY)  # also where NaN
    basis = first @ whitener.to(y.dtype)
    if failed.any():
        basis[failed] = torch.linalg.qr(first[failed]).Q
    return basis


def _near_orthonormal(y: Tensor, rows: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(y T, T [..., b, b] float64, shift [...] with Tᵀ (yᵀy + shift·I) T = I or nearly so).

    y T spans what y does and is orthonormal but for what the shift adds: enough to multiply on
    with. Where directions lie so far below y's largest that the shift rules them, it takes a second
    pass. For ``rows`` the transpose of the result is contiguous.
    """

    def apply(y: Tensor, whitener: Tensor) -> Tensor:
        factor = whitener.to(y.dtype)
        return (factor.mT @ y.mT).mT if rows else y @ factor

    whitener, shift = _whitener(y)
    first = apply(y, whitener)
    if y.is_cpu:  # elsewhere a pass costs less than asking whether it is needed
        pivots = whitener.diagonal(dim1=-2, dim2=-1).abs().amax(-1).square()
        if bool((pivots * shift * _CLEAR < 1.0).all()):
            return first, whitener, shift
    second, _ = _whitener(first)
    return apply(first, second), whitener @ second, shift


def _squares(y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(y, dim=-1).double().square().sum(-1)


def _whitener(y: Tensor) -> tuple[Tensor, Tensor]:
    gram = (y.mT @ y).double()
    shift = _shift(gram, y.dtype)
    return small.whitening(gram, shift)[0], shift


def _shift(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """What makes a Gram matrix rounded to ``dtype`` positive definite, [...]; 1 for a zero one."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(trace > 0, trace * (_SHIFT * torch.finfo(dtype).eps), 1.0)
