"""Matrices with chosen singular values for the tests, and how far a decomposition is off."""

from __future__ import annotations

import torch

ORTHOGONAL = 1e-5  # of float32 bases: what the operations promise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(n, k, values, dtype=torch.float32, seed=0):
    """[n, k] with the singular values ``values(i)``, i = 0 … min(n, k) - 1, at random."""
    p, generator = min(n, k), seeded(seed)
    u, v = (
        torch.linalg.qr(torch.randn(m, p, generator=generator, dtype=torch.float64)).Q
        for m in (n, k)
    )
    return ((u * values(torch.arange(p, dtype=torch.float64))) @ v.T).to(dtype)


SPECTRA = {
    "slow": lambda i: (i + 1) ** -0.5,
    "power": lambda i: (i + 1) ** -1.0,
    "steep power": lambda i: (i + 1) ** -2.0,
    "exponential": lambda i: 0.9**i,
    "steep": lambda i: 0.6**i,
}


def off_orthogonal(basis):
    """The largest element of QᵀQ - I for columns [..., M, q]."""
    eye = torch.eye(basis.shape[-1], dtype=torch.float64)
    return float((basis.double().mT @ basis.double() - eye).abs().amax()) if basis.numel() else 0.0


def sound(result, orthogonal=ORTHOGONAL):
    """Finite, sorted, non-negative values between orthonormal bases."""
    u, s, vh = result[:3]
    assert all(torch.isfinite(t).all() for t in result)
    assert (s >= 0).all() and (s.diff(dim=-1) <= 0).all()
    assert off_orthogonal(u) <= orthogonal and off_orthogonal(vh.mT) <= orthogonal
    return True


def residual(x, result):
    """‖X - U diag(S) Vh‖_F in float64."""
    u, s, vh = (t.double() for t in result[:3])
    return torch.linalg.matrix_norm(x.double() - (u * s.unsqueeze(-2)) @ vh)
