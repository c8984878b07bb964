"""The specification: both decompositions by a full SVD. Only tests and benches import it."""

from __future__ import annotations

import torch
from torch import Tensor


def svd_lowrank_reference(matrices: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(U, S, Vh, error) of the best rank-q approximation (Eckart, Young) of [..., N, K].

    error = (Σ_{i>q} σ_i²)^½ is the smallest that any rank-q matrix can have.
    """
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u[..., :q], s[..., :q], vh[..., :q, :], torch.linalg.vector_norm(s[..., q:], dim=-1)


def svd_product_reference(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vh) of B·A, its first min(N, r, K) values; the product is formed."""
    p = min(lora_B.shape[-2], *lora_A.shape[-2:])
    return svd_lowrank_reference(lora_B @ lora_A, p)[:3]
