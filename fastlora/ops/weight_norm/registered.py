"""The operation as torch.library operators, which torch.compile keeps whole in its graph.

Eager calls do not come through here: a registered operator costs tens of microseconds a call.
A compiled call computes its norm each time: what a cache remembers is not part of a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.weight_norm.contract import BACKENDS, result_dtype


def compiled(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    differentiable: bool,
    backend: str | None,
) -> Tensor:
    """``weight_norm`` for a call being traced; its backend is fixed when the graph is made."""
    name = _choose(weight.device, weight.dtype, backend)
    if not differentiable:
        lora_A, lora_B = lora_A.detach(), lora_B.detach()
    return forward_op(weight.detach(), lora_A, lora_B, scaling, name)


@torch.compiler.assume_constant_result
def _choose(device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    return _backend.choose("weight_norm", BACKENDS, device, dtype, backend).name


@torch.library.custom_op("fastlora::weight_norm_forward", mutates_args=())
def forward_op(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str
) -> Tensor:
    """n [N] as a backend's ``forward`` gives it."""
    module = _backend.select("weight_norm", BACKENDS, weight.device, weight.dtype, backend)
    norm, _ = module.forward(
        weight, lora_A.to(weight.dtype), lora_B.to(weight.dtype), scaling, None
    )
    return norm


@forward_op.register_fake
def _(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=result_dtype(weight.dtype))


@torch.library.custom_op("fastlora::weight_norm_backward", mutates_args=())
def backward_op(
    dnorm: Tensor,
    norm: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    need_A: bool,
    need_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dA, dB), each in its operand's dtype; empty where not needed."""
    module = _backend.select("weight_norm", BACKENDS, weight.device, weight.dtype, backend)
    a, b = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    dA, dB = module.backward(dnorm, norm, weight, a, b, scaling, need_A, need_B)
    return (
        lora_A.new_empty(0) if dA is None else dA.to(lora_A.dtype),
        lora_B.new_empty(0) if dB is None else dB.to(lora_B.dtype),
    )


@backward_op.register_fake
def _(
    dnorm: Tensor,
    norm: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    need_A: bool,
    need_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        lora_A.new_empty(lora_A.shape if need_A else (0,)),
        lora_B.new_empty(lora_B.shape if need_B else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, lora_A, lora_B, ctx.scaling, ctx.backend = inputs
    ctx.save_for_backward(weight, lora_A, lora_B, output)


def _backward(ctx: Any, dnorm: Tensor) -> tuple[Tensor | None, ...]:
    weight, lora_A, lora_B, norm = ctx.saved_tensors
    _, need_A, need_B = ctx.needs_input_grad[:3]
    dA, dB = backward_op(
        dnorm, norm, weight, lora_A, lora_B, ctx.scaling, need_A, need_B, ctx.backend
    )
    return None, dA if need_A else None, dB if need_B else None, None, None


forward_op.register_autograd(_backward, setup_context=_save)
