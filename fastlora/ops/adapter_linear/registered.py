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
from fastlora.ops.adapter_linear import scaled
from fastlora.ops.adapter_linear.contract import BACKENDS, Needs, Scales, rows
from fastlora.ops.dropout import draw_seed


def compiled(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    scales: Scales | None,
    drop_base: bool,
    keep_output: bool,
    backend: str | None,
) -> Tensor:
    """``adapter_linear`` for a call being traced; its backend is fixed when the graph is made."""
    name = _choose(x.device, x.dtype, backend)
    seed = None
    if dropout_p > 0.0:
        seed = draw_seed(x.device if name == "triton" else "cpu")
    if scales is not None:
        trains = scales.out is not None and scales.out.requires_grad
        keep_z = drop_base and keep_output and trains
        y, _, _ = scaled_forward_op(
            x,
            weight,
            lora_A,
            lora_B,
            bias,
            *scales,
            scaling,
            dropout_p,
            seed,
            drop_base,
            keep_z,
            keep_output,
            name,
        )
        return y
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


# ---------------------------------------------------------------------------- calls with vectors


@torch.library.custom_op("fastlora::adapter_linear_scaled_forward", mutates_args=())
def scaled_forward_op(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    mid_scale: Tensor | None,
    adapter_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    drop_base: bool,
    keep_z: bool,
    keep_output: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., N], t [M, r], z [M, N], or z [0] unless ``keep_z``) of ``scaled.forward``.

    ``keep_output`` says what is saved: without it, and without z, nothing of y's size is.
    """
    module = _backend.select("adapter_linear", BACKENDS, x.device, x.dtype, backend)
    y, t, z = scaled.forward(
        module,
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        Scales(out_scale, mid_scale, adapter_scale),
        scaling,
        dropout_p,
        seed,
        drop_base,
        need_t=True,
        need_z=keep_z,
    )
    assert t is not None
    return y, t, x.new_empty(0) if z is None else z


@scaled_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    mid_scale: Tensor | None,
    adapter_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    drop_base: bool,
    keep_z: bool,
    keep_output: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    n, r = lora_B.shape
    z = x.new_empty(tokens, n) if keep_z else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], n), x.new_empty(tokens, r), z


@torch.library.custom_op("fastlora::adapter_linear_scaled_backward", mutates_args=())
def scaled_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    mid_scale: Tensor | None,
    adapter_scale: Tensor | None,
    t: Tensor,
    read: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    drop_base: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of the first eight operands of the forward, in their dtypes; else empty."""
    module = _backend.select("adapter_linear", BACKENDS, x.device, x.dtype, backend)
    scales = Scales(out_scale, mid_scale, adapter_scale)
    kept = scaled.Kept(x, weight, lora_A, lora_B, bias, scales, t, read, seed)
    gradients = scaled.backward(
        module, dy, kept, scaling, dropout_p, drop_base, scaled.ScaledNeeds(*needs)
    )
    operands = (x, weight, lora_A, lora_B, bias, *scales)
    return [
        x.new_empty(0)
        if gradient is None or operand is None
        else gradient.to(operand.dtype).view(operand.shape).contiguous()
        for gradient, operand in zip(gradients, operands, strict=True)
    ]


@scaled_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    mid_scale: Tensor | None,
    adapter_scale: Tensor | None,
    t: Tensor,
    read: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    drop_base: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    operands = (x, weight, lora_A, lora_B, bias, out_scale, mid_scale, adapter_scale)
    return [
        x.new_empty(0) if operand is None or not need else operand.new_empty(operand.shape)
        for operand, need in zip(operands, needs, strict=True)
    ]


def _save_scaled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ctx.scaling, ctx.dropout_p, seed, ctx.drop_base, keep_z, keep_y, ctx.backend = inputs
    y, t, z = output
    read = z if keep_z else None
    if keep_y and not ctx.drop_base and ctx.needs_input_grad[5]:
        # the model may change y in place; where a graph is cut in two, nothing is copied for this
        read = y.clone()
    ctx.save_for_backward(*operands, t, read, seed)


def _scaled_backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    *operands, t, read, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:8])
    gradients = scaled_backward_op(
        dy,
        *operands,
        t,
        read if needs[5] else None,
        seed,
        ctx.scaling,
        ctx.dropout_p,
        ctx.drop_base,
        needs,
        ctx.backend,
    )
    asked = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*asked, *[None] * 7)


scaled_forward_op.register_autograd(_scaled_backward, setup_context=_save_scaled)
