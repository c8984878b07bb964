"""AdaLoRA (arXiv 2303.10512): what keeps its factors close to singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlora.adapters.view import layers


def orthogonal_regulariser(model: nn.Module, adapter: str | None = None) -> Tensor:
    """The mean over all A and B of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F; a scalar to add to the loss.

    The unsquared norms are those of the official code and of peft (the paper's eq. 4 squares them),
    to be weighted by ``orth_reg_weight``, 0.5 in peft. A layer that has lost all its ranks counts
    as zero. Factors of one shape are taken at once.

    ``adapter`` names one of peft's adapters; None takes those that are active.

    Raises ValueError for a model without AdaLoRA layers.
    """
    factors: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
    count = 0
    for layer in layers(model, adapter):
        if layer.method != "ADALORA":
            continue
        for rows in (layer.lora_A, layer.lora_B.t()):  # [r, K] and [r, N]: rows to be orthonormal
            factors.setdefault((rows.shape, rows.dtype, rows.device), []).append(rows)
            count += 1
    if not count:
        raise ValueError("the model has no AdaLoRA layers")
    total: Tensor | None = None
    for (shape, dtype, device), group in factors.items():
        stack = torch.stack(group)
        gram = stack @ stack.mT
        identity = torch.eye(shape[0], dtype=dtype, device=device)
        norms = torch.linalg.vector_norm(gram - identity, dim=(1, 2)).sum()
        total = norms if total is None else total + norms.to(total.device)
    assert total is not None
    return total / count
