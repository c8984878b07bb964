"""peft's LoRA ``Linear``: LoRA, rsLoRA, DoRA, LoRA-FA, with or without lora_bias."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora.integrations.peft import lora, reasons
from fastlora.integrations.peft.fused import Fused
from fastlora.integrations.peft.linear_kind import FusedLinearKind
from fastlora.nn.lora_linear import bias_with
from fastlora.ops.adapter_group import Member


class FusedLinear(PeftLinear, FusedLinearKind):
    """peft's LoRA ``Linear`` as one call of ``adapter_linear``."""

    peft_class = PeftLinear
    forward, _get_name = Fused.forward, Fused._get_name
    __setstate__ = FusedLinearKind.__setstate__
    hidden = (6, 8)  # lora_bias, magnitude

    @staticmethod
    def never(layer: Any) -> str | None:
        if reason := reasons.of_class(layer, nn.Linear, Conv1D):
            return reason
        return reasons.of_variants(layer, DoraLinearVariant)

    @staticmethod
    def look(layer: Any, x: Tensor | None = None) -> lora.Sources | str:
        sources = lora.look(layer, x, (nn.Linear, Conv1D), (DoraLinearVariant,))
        if isinstance(sources, str):
            return sources
        dora = sources.dora
        if dora is not None and bool(dora.fan_in_fan_out) != (type(sources.base) is Conv1D):
            return "its DoRA takes the norm over the other dimension (fan_in_fan_out)"
        return sources

    @staticmethod
    def summary(layer: Any, sources: lora.Sources) -> str:
        adapter, is_dora = sources.adapter, sources.dora is not None
        return lora.summary(layer, adapter, is_dora, sources.lora_A, sources.lora_B)

    def operands(self, sources: lora.Sources, x: Tensor) -> Member:
        adapter, base, weight, bias, A, B, lora_bias, _, magnitude, scaling, p = sources
        if type(base) is Conv1D:
            weight = weight.t()
        if magnitude is not None:
            g = lora.scale(self._fastlora, adapter, magnitude, weight, A, B, scaling)
            return Member(weight, A, B, scaling, bias, p, g, drop_base=p > 0.0)
        if lora_bias is not None:
            bias = bias_with(bias, lora_bias, scaling, weight.dtype)
        return Member(weight, A, B, scaling, bias, p)
