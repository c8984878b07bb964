"""The specification: what a solution must satisfy. Only tests and benches import it."""

from __future__ import annotations

import torch
from torch import Tensor


def eigen_errors(a: Tensor, w: Tensor, v: Tensor) -> tuple[float, float]:
    """The worst matrix's (‖A − V diag(w) Vᵀ‖ / ‖A‖, ‖VᵀV − I‖ / √r), in Frobenius norms.

    ``a`` [..., r, r] symmetric. Computed in float64.
    """
    a, w, v = a.double(), w.double(), v.double()
    return _relative(a - (v * w.unsqueeze(-2)) @ v.mT, a), _skewness(v)


def svd_errors(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> tuple[float, float]:
    """The worst matrix's (‖A − U diag(S) Vh‖ / ‖A‖, the larger skewness of U and Vh)."""
    a, u, s, vh = a.double(), u.double(), s.double(), vh.double()
    residual = _relative(a - (u * s.unsqueeze(-2)) @ vh, a)
    return residual, max(_skewness(u), _skewness(vh.mT))


def _relative(error: Tensor, a: Tensor) -> float:
    if not a.numel():
        return 0.0
    # by the largest element, so that no square leaves float64's range
    largest = a.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(a / largest, dim=(-2, -1)).clamp_min(1.0)
    return float((torch.linalg.vector_norm(error / largest, dim=(-2, -1)) / norms).max())


def _skewness(columns: Tensor) -> float:
    if not columns.numel():
        return 0.0
    eye = torch.eye(columns.shape[-1], dtype=columns.dtype, device=columns.device)
    norms = torch.linalg.vector_norm(columns.mT @ columns - eye, dim=(-2, -1))
    return float(norms.max() / columns.shape[-1] ** 0.5)
