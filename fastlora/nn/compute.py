"""A layer's own call of ``adapter_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.nn.recomputed import spare
from fastlora.ops.adapter_group import Member
from fastlora.ops.adapter_linear import adapter_linear


def compute(x: Tensor, member: Member) -> Tensor:
    """``adapter_linear`` of x [..., K] with these operands, x kept only if it must be."""
    weight, lora_A, lora_B, scaling, bias, dropout_p, g, d, b, drop_base, keep_output = member
    if g is None and d is None and b is None:
        y = adapter_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    else:
        y = adapter_linear(
            x, weight, lora_A, lora_B, scaling, bias, dropout_p,
            out_scale=g, mid_scale=d, adapter_scale=b,
            drop_base=drop_base, keep_output=keep_output,
        )  # fmt: skip
    if not torch.compiler.is_compiling():  # where a tensor has no grad_fn to look at
        spare(x, y)
    return y
