"""Which rows of an embedding a gradient touches (lazy rows, kexue 9736), sparse gradients too."""

from __future__ import annotations

import torch
from torch import Tensor


def touched(grad: Tensor) -> Tensor | None:
    """bool [rows]: where the gradient's row (last axis) is not all zeros, or, of a sparse gradient
    [V, D] with whole rows, which rows it has. None for tensors of less than two axes.

    A NaN touches its row.
    """
    if grad.dim() < 2:
        return None
    if grad.is_sparse:
        if grad.sparse_dim() == 1 and grad.dim() == 2:
            mask = torch.zeros(grad.shape[0], dtype=torch.bool, device=grad.device)
            mask[grad.coalesce().indices()[0]] = True
            return mask
        grad = grad.to_dense()
    if grad.numel() == 0:
        return torch.zeros(grad.shape[:-1], dtype=torch.bool, device=grad.device).flatten()
    return (torch.linalg.vector_norm(grad, float("inf"), dim=-1) != 0).flatten()
