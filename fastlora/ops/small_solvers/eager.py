"""The same by torch.linalg: LAPACK on the CPU, cuSOLVER on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastlora.ops.small_solvers.contract import SWEEPS


def symmetric_eigen(a: Tensor, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor]:
    """(w [batch, n] ascending, v [batch, n, n]) of the lower triangles of [batch, n, n]."""
    if not torch.isfinite(a.tril()).all():
        raise ValueError(NOT_FINITE)
    w, v = _solved(torch.linalg.eigh, a)
    return w, v


def small_svd(a: Tensor, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, Tensor]:
    """(U [batch, m, n], S [batch, n] descending, Vh [batch, n, n]) of [batch, m, n], m ≥ n."""
    if not torch.isfinite(a).all():
        raise ValueError(NOT_FINITE)
    u, s, vh = _solved(partial(torch.linalg.svd, full_matrices=False), a)
    return u, s, vh


def _solved(solve: Callable[..., Sequence[Tensor]], a: Tensor) -> Sequence[Tensor]:
    """In float64 where float32 does not converge: LAPACK's syevd fails on some of low rank."""
    try:
        return solve(a)
    except torch.linalg.LinAlgError:
        if a.dtype == torch.float64:
            raise
        return [t.to(a.dtype) for t in solve(a.double())]


NOT_FINITE = "a matrix holds NaN or infinity, so it has neither eigenvalues nor singular values"
