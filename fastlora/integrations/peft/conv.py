"""peft's LoRA ``Conv1d``, ``Conv2d`` and ``Conv3d``: LoRA and DoRA, with or without lora_bias."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Conv1d as PeftConv1d
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Conv3d as PeftConv3d
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant
from torch import Tensor

from fastlora.integrations.peft import lora, reasons
from fastlora.integrations.peft.fused import Fused
from fastlora.nn.lora_conv import KINDS, Shape, adapted_conv
from fastlora.nn.lora_linear import bias_with

_DORA = (DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)


class FusedConv(Fused):
    """peft's LoRA convolution by ``adapted_conv``."""

    __slots__ = ()

    @staticmethod
    def never(layer: Any) -> str | None:
        if reason := reasons.of_class(layer, *KINDS):
            return reason
        return _of_base(layer.base_layer) or reasons.of_variants(layer, *_DORA)

    @staticmethod
    def look(layer: Any, x: Tensor | None = None) -> lora.Sources | str:
        sources = lora.look(layer, x, KINDS, _DORA)
        if isinstance(sources, str):
            return sources
        base, lora_A = sources.base, layer._modules["lora_A"]._modules[sources.adapter]
        if reason := _of_base(base):
            return reason
        if (lora_A.stride, lora_A.padding) != (base.stride, base.padding):
            return "lora_A does not walk over its input as the base does"
        if sources.dora is not None and base.groups > 1:
            return "DoRA needs the norm of its weight, and its base is a grouped convolution"
        if x is not None and x.dim() != sources.weight.dim():
            return "the input is not a batch"
        return sources

    @staticmethod
    def summary(layer: Any, sources: lora.Sources) -> str:
        adapter, is_dora = sources.adapter, sources.dora is not None
        return lora.summary(layer, adapter, is_dora, sources.lora_A, sources.lora_B)

    def fused_forward(self, x: Tensor) -> Tensor | None:
        sources = self.look(self, x)
        if isinstance(sources, str):
            return None
        adapter, base, weight, bias, A, B, lora_bias, _, magnitude, scaling, p = sources
        g = None
        if magnitude is not None:
            flat = weight.flatten(1), A.flatten(1), B.flatten(1)
            g = lora.scale(self._fastlora, adapter, magnitude, *flat, scaling)
        elif lora_bias is not None:
            bias = bias_with(bias, lora_bias, scaling, weight.dtype)
        shape = Shape(base.stride, base.padding, base.groups)
        return adapted_conv(x, weight, A, B, scaling, bias, p, g, shape)


class FusedConv1d(PeftConv1d, FusedConv):
    peft_class = PeftConv1d
    forward, _get_name = Fused.forward, Fused._get_name


class FusedConv2d(PeftConv2d, FusedConv):
    peft_class = PeftConv2d
    forward, _get_name = Fused.forward, Fused._get_name


class FusedConv3d(PeftConv3d, FusedConv):
    peft_class = PeftConv3d
    forward, _get_name = Fused.forward, Fused._get_name


def _of_base(base: Any) -> str | None:
    if any(step != 1 for step in base.dilation):
        return "its base is dilated, which lora_A is not"
    if base.padding_mode != "zeros":
        return f"its base pads with '{base.padding_mode}', which lora_A does not"
    return None
