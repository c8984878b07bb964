"""The same by torch.linalg: LAPACK on the CPU, cuSOLVER on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops.small_solvers.contract import SWEEPS


def symmetric_eigen(a: Tensor, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor]:
    """(w [batch, n] ascending, v [batch, n, n]) of the lower triangles of [batch, n, n]."""
    if not torch.isfinite(a.tril()).all():
        raise ValueError(NOT_FINITE)
    w, v = torch.linalg.eigh(a)
    return w, v


def small_svd(a: Tensor, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, Tensor]:
    """(U [batch, m, n], S [batch, n] descending, Vh [batch, n, n]) of [batch, m, n], m ≥ n."""
    if not torch.isfinite(a).all():
        raise ValueError(NOT_FINITE)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u, s, vh


NOT_FINITE = "a matrix holds NaN or infinity, so it has neither eigenvalues nor singular values"
