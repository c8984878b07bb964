"""The operation as torch.library operators, which torch.compile keeps whole in its graph.

Eager calls do not come through here: a registered operator costs tens of microseconds a call.
What is absent (a bias, a seed, a gradient nobody asked for) is an empty tensor, because an
operator's results cannot be None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.adapter_linear.contract import BACKENDS, Needs, rows
from fastlora.ops.dropout import draw_seed


def compiled(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    """``adapter_linear`` for a call being traced; its backend is fixed when the graph is made."""
    name = _choose(x.device, x.dtype, backend)
    seed = None
    if dropout_p > 0.0:
        seed = draw_seed(x.device if name == "triton" else "cpu")
    y, _ = forward_op(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, name)
    return y


@torch.compiler.assume_constant_result
def _choose(device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    return _backend.choose("adapter_linear", BACKENDS, device, dtype, backend).name


@torch.library.custom_op("fastlora::adapter_linear_forward", mutates_args=())
def forward_op(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y [..., N], t [M, r]) as a backend's ``forward`` gives them."""
    module = _backend.select("adapter_linear", BACKENDS, x.device, x.dtype, backend)
    y, t = module.forward(
        rows(x),
        weight,
        lora_A.to(x.dtype),
        lora_B.to(x.dtype),
        scaling,
        bias,
        dropout_p,
        seed,
        need_t=True,
    )
    return y.view(*x.shape[:-1], weight.shape[0]), t


@forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(tokens, lora_A.shape[0])


@torch.library.custom_op("fastlora::adapter_linear_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    t: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    bias_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dA, dB, dbias), each in its operand's dtype; empty where not needed."""
    module = _backend.select("adapter_linear", BACKENDS, x.device, x.dtype, backend)
    asked = Needs(*needs)
    dx, dweight, dA, dB, dbias = module.backward(
        rows(dy),
        rows(x),
        weight,
        lora_A.to(x.dtype),
        lora_B.to(x.dtype),
        t,
        scaling,
        dropout_p,
        seed,
        asked,
    )
    nothing = x.new_empty(0)
    return (
        nothing if dx is None else dx.view(x.shape),
        nothing.clone() if dweight is None else dweight.contiguous(),
        nothing.clone() if dA is None else dA.to(lora_A.dtype).contiguous(),
        nothing.clone() if dB is None else dB.to(lora_B.dtype).contiguous(),
        nothing.clone() if dbias is None else dbias.to(bias_dtype),
    )


@backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    t: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    bias_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(operand: Tensor, needed: bool) -> Tensor:
        return operand.new_empty(operand.shape if needed else (0,))

    asked = Needs(*needs)
    return (
        like(x, asked.x),
        like(weight, asked.weight),
        like(lora_A, asked.lora_A),
        like(lora_B, asked.lora_B),
        x.new_empty(weight.shape[0] if asked.bias else 0, dtype=bias_dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, bias, ctx.scaling, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.bias_dtype = x.dtype if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], seed)


def _backward(ctx: Any, dy: Tensor, dt: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, t, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    gradients = backward_op(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        t,
        ctx.scaling,
        ctx.dropout_p,
        seed,
        needs,
        ctx.bias_dtype,
        ctx.backend,
    )
    asked = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*asked, None, None, None, None)


forward_op.register_autograd(_backward, setup_context=_save)
