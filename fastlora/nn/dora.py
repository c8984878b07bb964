"""DoRA's magnitudes (arXiv 2402.09353): g = m / ‖W + s·BA‖, one for each output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlora.ops.weight_norm import WeightNormCache, weight_norm


class Magnitude(nn.Module):
    """m, one number an output in any shape, trained; and what computes g from it.

    ``simple``: the norm is a constant in backward (the paper's §4.3, peft's way and that of the
    official code's ``dora_simple``); False lets the gradient flow through it.
    """

    def __init__(self, norm: Tensor, dtype: torch.dtype, simple: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.detach().to(dtype))
        self.simple = simple
        self.cache = WeightNormCache()

    def scale(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """g [N]. weight [N, K], lora_A [r, K], lora_B [N, r]; float32, or float64 over float64."""
        norm = weight_norm(
            weight, lora_A, lora_B, scaling, cache=self.cache, differentiable=not self.simple
        )
        m = self.weight
        return (m if m.dim() == 1 else m.view(-1)) / norm

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, simple={self.simple}"
