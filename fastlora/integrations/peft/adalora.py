"""peft's AdaLoRA ``SVDLinear``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import SVDLinear as PeftSVDLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora.integrations.peft import reasons
from fastlora.integrations.peft.fused import Fused
from fastlora.integrations.peft.linear_kind import FusedLinearKind
from fastlora.ops.adapter_group import Member

_RANK_GUARD = 1e-5  # peft's, of a rank of zero


class Sources(NamedTuple):
    """What the layer computes with; ``weight`` as the base has it."""

    adapter: str
    weight: Tensor
    transposed: bool  # [K, N], as in transformers' Conv1D
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_E: Tensor
    ranknum: Tensor
    scaling: float
    dropout_p: float


class FusedSVDLinear(PeftSVDLinear, FusedLinearKind):
    """peft's ``SVDLinear`` as one call of ``adapter_linear``, E being its ``mid_scale``."""

    peft_class = PeftSVDLinear
    forward, _get_name = Fused.forward, Fused._get_name
    __setstate__ = FusedLinearKind.__setstate__
    hidden = (7,)  # ranknum

    @staticmethod
    def never(layer: Any) -> str | None:
        return reasons.of_class(layer, nn.Linear, Conv1D)

    @staticmethod
    def look(layer: Any, x: Tensor | None = None) -> Sources | str:
        modules = layer._modules
        factors_A = modules["lora_A"]._parameters
        active = reasons.active(layer, factors_A)
        if reason := reasons.of_state(layer, active):
            return reason
        adapter = active[0]
        base = modules["base_layer"]
        dropout = modules["lora_dropout"]._modules[adapter]
        scaling = layer.scaling[adapter]
        weight, bias = reasons.weight_and_bias(base)
        transposed = type(base) is Conv1D
        if not transposed and type(base) is not nn.Linear:
            return f"the base layer is a {type(base).__name__}"
        if reason := (
            reasons.of_dropout(dropout)
            or reasons.of_parts(base, dropout)
            or reasons.of_scaling(scaling)
        ):
            return reason
        lora_A, lora_B = factors_A[adapter], modules["lora_B"]._parameters[adapter]
        lora_E = modules["lora_E"]._parameters[adapter]
        if reason := reasons.of_tensors(weight, (lora_A, lora_B, lora_E), x):
            return reason
        if lora_A.shape[0] == 0 and x is not None:
            return "no rank is left to it, and its base is all there is to compute"
        return Sources(
            adapter,
            weight,
            transposed,
            bias,
            lora_A,
            lora_B,
            lora_E,
            modules["ranknum"]._parameters[adapter],
            scaling,
            dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
        )

    @staticmethod
    def summary(layer: Any, sources: Sources) -> str:
        rank = sources.lora_A.shape[0]
        if rank == 0:
            return "AdaLoRA, r=0: the base alone, by peft's forward"
        return f"AdaLoRA, r={rank}, scaling={sources.scaling / _rank(sources.ranknum.detach()):g}"

    def operands(self, sources: Sources, x: Tensor) -> Member:
        adapter, weight, transposed, bias, A, B, E, ranknum, scaling, p = sources
        if transposed:
            weight = weight.t()
        # peft makes ranknum trainable where it casts a layer's parts (over a base in bfloat16, say)
        if ranknum.requires_grad or reasons.in_transform():
            wide = torch.promote_types(ranknum.dtype, torch.float32)
            d = E.view(-1) * (scaling / (ranknum + _RANK_GUARD).to(wide))
            return Member(weight, A, B, 1.0, bias, p, mid_scale=d)
        scaling = scaling / self._rank(adapter, ranknum)
        return Member(weight, A, B, scaling, bias, p, mid_scale=E.view(-1))

    def _rank(self, adapter: str, ranknum: Tensor) -> float:
        """The number in ``ranknum``, guarded. A GPU is waited for only when it may have changed."""
        if ranknum.is_cpu:
            return _rank(ranknum)
        kept = self._fastlora.own
        version = None if ranknum.is_inference() else ranknum._version
        key = adapter, ranknum.data_ptr(), version
        if kept is None or kept[0] != key or kept[1] is not ranknum or version is None:
            kept = self._fastlora.own = key, ranknum, _rank(ranknum)
        return kept[2]


def _rank(ranknum: Tensor) -> float:
    return ranknum.item() + _RANK_GUARD
