"""peft's VeRA ``Linear``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.vera.layer import Linear as PeftVeraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora.integrations.peft import reasons
from fastlora.integrations.peft.fused import Fused
from fastlora.integrations.peft.linear_kind import FusedLinearKind
from fastlora.nn.vera_linear import Copies
from fastlora.ops.adapter_group import Member


class Sources(NamedTuple):
    """What the layer computes with; ``weight`` as the base has it, A and B as the whole model."""

    adapter: str
    weight: Tensor
    transposed: bool  # [K, N], as in transformers' Conv1D
    bias: Tensor | None
    vera_A: Tensor
    vera_B: Tensor
    lambda_d: Tensor
    lambda_b: Tensor
    dropout_p: float


class FusedVeraLinear(PeftVeraLinear, FusedLinearKind):
    """peft's VeRA ``Linear`` as one call of ``adapter_linear``, d and b being its vectors."""

    peft_class = PeftVeraLinear
    forward, _get_name = Fused.forward, Fused._get_name
    __setstate__ = FusedLinearKind.__setstate__
    hidden = (4, 5)  # the projections

    @staticmethod
    def never(layer: Any) -> str | None:
        return reasons.of_class(layer, nn.Linear, Conv1D)

    @staticmethod
    def look(layer: Any, x: Tensor | None = None) -> Sources | str:
        modules = layer._modules
        vectors_d = modules["vera_lambda_d"]._parameters
        active = reasons.active(layer, vectors_d)
        if reason := reasons.of_state(layer, active):
            return reason
        adapter = active[0]
        base = modules["base_layer"]
        dropout = modules["vera_dropout"]._modules[adapter]
        weight, bias = reasons.weight_and_bias(base)
        transposed = type(base) is Conv1D
        if not transposed and type(base) is not nn.Linear:
            return f"the base layer is a {type(base).__name__}"
        if reason := (
            reasons.of_dropout(dropout, "vera_dropout") or reasons.of_parts(base, dropout)
        ):
            return reason
        d, b = vectors_d[adapter], modules["vera_lambda_b"]._parameters[adapter]
        if reason := reasons.of_tensors(weight, (d, b), x):
            return reason
        vera_A = modules["vera_A"]._buffers[adapter]
        vera_B = modules["vera_B"]._buffers[adapter]
        if vera_A.shape[0] != d.shape[0]:
            return "the projections have another rank than the adapter"
        for projection in (vera_A, vera_B):
            if type(projection) not in reasons.WEIGHTS or projection.dtype not in reasons.FLOATS:
                return f"a projection is a {type(projection).__name__} of {projection.dtype}"
        return Sources(
            adapter,
            weight,
            transposed,
            bias,
            vera_A,
            vera_B,
            d,
            b,
            dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
        )

    @staticmethod
    def summary(layer: Any, sources: Sources) -> str:
        return f"VeRA, r={layer.r[sources.adapter]}"

    def fused_forward(self, x: Tensor) -> Tensor | None:
        y = super().fused_forward(x)
        # peft gives x's dtype back, under autocast too
        return y if y is None or y.dtype == x.dtype else y.to(x.dtype)

    def operands(self, sources: Sources, x: Tensor) -> Member:
        _, weight, transposed, bias, _, _, d, b, p = sources
        if transposed:
            weight = weight.t()
        A, B = self._slices(sources, weight, x)
        return Member(weight, A, B, 1.0, bias, p, mid_scale=d, adapter_scale=b)

    def _slices(self, sources: Sources, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's part of the projections, in the dtype that is computed in."""
        n, k = weight.shape
        device, dtype = weight.device, x.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        A, B = sources.vera_A, sources.vera_B
        if reasons.in_transform():
            return A[:, :k].to(device, dtype), B[:n].to(device, dtype)
        copies: Copies = self._fastlora.shared
        name = sources.adapter
        return copies.columns(name, A, k, dtype, device), copies.rows(name, B, n, dtype, device)
