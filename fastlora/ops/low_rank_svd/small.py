"""The dense problems of size q × q: batched, in float64, the same on every device.

``svd`` is the only iterative solver underneath; all else here is products and Cholesky factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops.small_solvers import small_svd

_SQUARINGS = 5


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U [..., m, p], S [..., p] descending, V [..., n, p]) of [..., m, n], p = min(m, n)."""
    # the eigenproblem of M Mᵀ would leave S only half the digits, and takes no less time
    u, s, vh = small_svd(matrix)
    return u, s, vh.mT


def whitening(gram: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(T [..., q, q] upper triangular with Tᵀ (G + shift·I) T = I, failed [...] bool).

    ``gram`` float64, ``shift`` [...]. Where the Cholesky factorisation fails, T means nothing.
    """
    if shift is not None:
        gram = gram.clone()
        gram.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    lower, info = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(gram), upper=False)
    return inverse.mT, info != 0


def smallest_eigenvalue(whitener: Tensor) -> Tensor:
    """A lower bound [...] of λ_min(G), within q^(1/32) of it, for T = ``whitening(G)``.

    G⁻¹ = T Tᵀ, and tr(G⁻³²)^(1/32) bounds its largest eigenvalue from above: five squarings of a
    matrix whose trace is 1, so that nothing overflows.
    """
    power = whitener @ whitener.mT
    trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
    power = power / trace[..., None, None]
    for _ in range(_SQUARINGS):
        power = power @ power
    return power.diagonal(dim1=-2, dim2=-1).sum(-1).pow(-1.0 / 2**_SQUARINGS) / trace
