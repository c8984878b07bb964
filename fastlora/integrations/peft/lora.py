"""What peft's LoRA layers over linears and convolutions have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora.integrations.peft import reasons
from fastlora.integrations.peft.fused import Memory
from fastlora.ops.weight_norm import weight_norm


class Sources(NamedTuple):
    """What a layer computes with; ``weight`` in the shape that the base has it."""

    adapter: str
    base: Any
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    dora: Any  # peft's module of the magnitude
    magnitude: Tensor | None
    scaling: float
    dropout_p: float


def look(
    layer: Any, x: Tensor | None, bases: tuple[type[nn.Module], ...], variants: tuple[type, ...]
) -> Sources | str:
    """What the layer computes with, or why peft's forward is to run; ``variants`` are DoRA's."""
    modules = layer._modules
    factors_A = modules["lora_A"]._modules
    active = reasons.active(layer, factors_A)
    if reason := reasons.of_state(layer, active):
        return reason
    adapter = active[0]
    base, lora_A = modules["base_layer"], factors_A[adapter]
    lora_B = modules["lora_B"]._modules[adapter]
    dropout = modules["lora_dropout"]._modules[adapter]
    scaling = layer.scaling[adapter]
    kind = type(base)
    if kind not in bases:
        return f"the base layer is a {kind.__name__}"
    factor = nn.Linear if kind is Conv1D else kind
    if type(lora_A) is not factor or type(lora_B) is not factor:
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
    weight, bias = reasons.weight_and_bias(base)
    A, bias_A = reasons.weight_and_bias(lora_A)
    B, lora_bias = reasons.weight_and_bias(lora_B)
    if bias_A is not None:
        return "lora_A has a bias"
    if reason := (
        reasons.of_dropout(dropout)
        or reasons.of_parts(base, lora_A, lora_B, dropout)
        or reasons.of_scaling(scaling)
    ):
        return reason
    drops = dropout.training and type(dropout) is nn.Dropout
    dora = magnitude = None
    tensors: tuple[Tensor, ...] = (A, B) if lora_bias is None else (A, B, lora_bias)
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter])
        if variant not in variants:
            return f"adapter '{adapter}' computes {variant.__name__}"
        if lora_bias is not None:
            return "DoRA with a bias in lora_B"
        dora = modules["lora_magnitude_vector"]._modules[adapter]
        magnitude = dora.weight
        tensors = A, B, magnitude
        drops = drops and layer.training
        if reason := reasons.of_dora(dora, weight, (A, B)):
            return reason
    if reason := reasons.of_tensors(weight, tensors, x):
        return reason
    p = dropout.p if drops else 0.0
    return Sources(adapter, base, weight, bias, A, B, lora_bias, dora, magnitude, scaling, p)


def scale(
    memory: Memory,
    adapter: str,
    magnitude: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """DoRA's g = m / ‖W + s·BA‖ [N]. weight [N, K], lora_A [r, K], lora_B [N, r]."""
    cache = None if torch.compiler.is_compiling() else memory.norm_of(adapter)
    return magnitude.view(-1) / weight_norm(weight, lora_A, lora_B, scaling, cache=cache)


def summary(layer: Any, adapter: str, is_dora: bool, lora_A: Tensor, lora_B: Tensor) -> str:
    """What a report says of a LoRA adapter."""
    said = ["DoRA"] if is_dora else []
    if layer.use_rslora.get(adapter):
        said.append("rsLoRA")
    said = said or ["LoRA"]
    if lora_B.requires_grad and not lora_A.requires_grad:
        said.append("A frozen")
    if layer.lora_bias.get(adapter):
        said.append("lora_bias")
    return ", ".join([*said, f"r={layer.r[adapter]}", f"scaling={layer.scaling[adapter]:g}"])
