"""The specification: the formula, naively, by plain autograd. Only tests and benches import it."""

from __future__ import annotations

from torch import Tensor


def weight_norm_reference(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, floor: float = 1e-12
) -> Tensor:
    """n_j = max(‖(W + s·BA)_j‖₂, floor)   (DoRA, arXiv 2402.09353, eq. 5; one norm per output).

    weight [N, K], lora_A [r, K], lora_B [N, r], n [N]. Computes in the operands' own dtypes, so
    float64 in gives float64 out. At the floor the gradient is zero.
    """
    merged = weight + scaling * (lora_B @ lora_A)
    return merged.square().sum(1).clamp_min(floor**2).sqrt()
