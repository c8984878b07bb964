"""AdaLoRA's linear layer: an update in the form of a singular value decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nn.adapted import adapter_dtype_over
from fastlora.nn.adapted_linear import AdaptedLinear, parameters_of
from fastlora.nn.lora_linear import check_hyperparameters
from fastlora.ops.adapter_group import Member

# peft's guard of a rank of zero, part of the scaling for every rank
_RANK_GUARD = 1e-5


class AdaLoRALinear(AdaptedLinear):
    """y = x Wᵀ + bias + c · ((drop(x) Aᵀ) ∘ E) Bᵀ, c = α / (init_r + 1e-5)   (arXiv 2303.10512).

    ``lora_A`` [r, K] and ``lora_B`` [N, r] start as N(0, 0.02²), ``lora_E`` [r, 1] at zero. c holds
    the *initial* rank whatever becomes of the rank (as in peft and the official code): a masked
    triplet has E = 0 and keeps its gradient. ``rank_mask`` tells which triplets are there at all;
    ``r``, their number, may be 0. ``kept`` tells which of a layer's with all its triplets
    ``methods.AdaLoRA`` has left in the end: only these are saved. α ≤ 0 stands for init_r. Make one
    with ``from_linear``.
    """

    kept: tuple[bool, ...] | None = None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        init_r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        rank_mask: Sequence[bool] | None = None,
    ) -> None:
        check_hyperparameters(init_r, lora_alpha, lora_dropout)
        mask = (True,) * init_r if rank_mask is None else tuple(rank_mask)
        if len(mask) != init_r or not all(isinstance(kept, bool) for kept in mask):
            raise ValueError(f"rank_mask must hold init_r = {init_r} times True or False")
        super().__init__(weight, bias)
        self.init_r = init_r
        self.rank_mask = mask
        self.r = sum(mask)
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.scaling = (lora_alpha if lora_alpha > 0 else init_r) / (init_r + _RANK_GUARD)
        dtype, r = adapter_dtype_over(weight.dtype, adapter_dtype), self.r

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))

        self.lora_A = empty(r, self.in_features)
        self.lora_E = empty(r, 1)
        self.lora_B = empty(self.out_features, r)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        init_r: int = 12,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        rank_mask: Sequence[bool] | None = None,
    ) -> AdaLoRALinear:
        """An adapted layer around ``linear``'s own weight and bias (shared, and frozen by this).

        ``rank_mask``: which of the ``init_r`` triplets are there (all, by default). Raises as
        ``LoRALinear.from_linear`` does, and ValueError for a mask of another length.
        """
        weight, bias = parameters_of(linear)
        layer = cls(weight, bias, init_r, lora_alpha, lora_dropout, adapter_dtype, rank_mask)
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draw A and B anew and set E to zero; the base stays."""
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        nn.init.zeros_(self.lora_E)

    def operands(self, dropout: bool) -> Member | None:
        if self.r == 0:
            return None
        return Member(
            self.weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.bias,
            self.lora_dropout if dropout else 0.0,
            mid_scale=self.lora_E.view(-1),
        )

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_E": self.lora_E, "lora_B": self.lora_B}

    def saved(self) -> dict[str, Tensor]:
        if self.kept is None:
            return super().saved()
        mask = torch.tensor(self.kept, device=self.lora_E.device)
        if self.lora_E[~mask].any():
            raise ValueError("a triplet that the allocation has masked is no longer zero")
        return {
            "lora_A": self.lora_A[mask],
            "lora_E": self.lora_E[mask],
            "lora_B": self.lora_B[:, mask],
        }

    def summary(self) -> str:
        return f"AdaLoRA, r={self.r} of {self.init_r}, scaling={self.scaling:g}"

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {
            "r": self.r,
            "init_r": self.init_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
        }
