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
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    t: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    x_shape: list[int],
    rank: int,
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    dtype_bias: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dA, dB, dbias), each in its operand's dtype; empty where not needed."""
    module = _backend.select("adapter_linear", BACKENDS, dy.device, dy.dtype, backend)
    dx, dweight, dA, dB, dbias = module.backward(
        rows(dy),
        None if x is None else rows(x),
        weight,
        None if lora_A is None else lora_A.to(dy.dtype),
        None if lora_B is None else lora_B.to(dy.dtype),
        t,
        scaling,
        dropout_p,
        seed,
        Needs(*needs),
    )

    def own(gradient: Tensor | None, dtype: torch.dtype) -> Tensor:
        """In the operand's dtype, dense, and sharing memory with no other result."""
        return dy.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype).contiguous()

    return (
        own(None if dx is None else dx.view(x_shape), dy.dtype),
        own(dweight, dy.dtype),
        own(dA, dtype_A),
        own(dB, dtype_B),
        own(dbias, dtype_bias),
    )


@backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    t: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    x_shape: list[int],
    rank: int,
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    dtype_bias: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    asked = Needs(*needs)
    n, k = dy.shape[-1], x_shape[-1]

    def shaped(needed: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return dy.new_empty(shape if needed else (0,), dtype=dtype)

    return (
        shaped(asked.x, dy.dtype, *x_shape),
        shaped(asked.weight, dy.dtype, n, k),
        shaped(asked.lora_A, dtype_A, rank, k),
        shaped(asked.lora_B, dtype_B, n, rank),
        shaped(asked.bias, dtype_bias, n),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, bias, ctx.scaling, ctx.dropout_p, seed, ctx.backend = inputs
    needs = Needs(*ctx.needs_input_grad[:5])
    ctx.shapes = (x.shape, lora_A.shape[0])
    ctx.dtypes = (lora_A.dtype, lora_B.dtype, x.dtype if bias is None else bias.dtype)
    ctx.save_for_backward(
        x if needs.lora_A or needs.weight else None,
        weight if needs.x else None,
        lora_A if needs.x else None,
        lora_B if needs.x or needs.lora_A else None,
        output[1] if needs.lora_B else None,
        seed,
    )


def _backward(ctx: Any, dy: Tensor, dt: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, t, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    x_shape, rank = ctx.shapes
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
        list(x_shape),
        rank,
        *ctx.dtypes,
        ctx.backend,
    )
    asked = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*asked, None, None, None, None)


forward_op.register_autograd(_backward, setup_context=_save)
