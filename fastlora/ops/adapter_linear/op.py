"""``adapter_linear``: a linear layer and its low-rank adapter as one differentiable function."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.adapter_linear.contract import BACKENDS, Needs, Scales, check_mask, rows
from fastlora.ops.adapter_linear.eager import composite
from fastlora.ops.adapter_linear.entry import (
    AUTOCAST,
    autocasts,
    cast,
    check,
    check_vectors,
    has_few_rows,
    is_transformed,
)
from fastlora.ops.adapter_linear.scaled import ScaledAdapterLinear
from fastlora.ops.dtypes import to
from fastlora.ops.once import once_differentiable


def adapter_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    out_scale: Tensor | None = None,
    mid_scale: Tensor | None = None,
    adapter_scale: Tensor | None = None,
    drop_base: bool = False,
    keep_output: bool = True,
    backend: str | None = None,
) -> Tensor:
    """y = g ∘ (x Wᵀ + s · b ∘ (((drop(x) Aᵀ) ∘ d) Bᵀ)) + bias, where g, b and d may be absent.

    Without them it is LoRA's layer (arXiv 2106.09685, eq. 3), y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ.
    DoRA (2402.09353) has g = m / ‖W + sBA‖, AdaLoRA (2303.10512) d = E, VeRA (2310.11454) d and b.

    Args:
        x: input [..., K]; any leading dimensions, any strides, any number of tokens (0 too).
        weight: base weight [N, K], in x's dtype; any strides (a transposed view serves Conv1D).
        lora_A, lora_B: [r, K] and [N, r], r ≥ 1; in x's dtype, or float32 over a half-precision
            base (then they are cast, never the activations).
        scaling: s, a finite number (α/r, or α/√r for rsLoRA).
        bias: [N] in x's dtype, or None.
        dropout_p: probability in [0, 1) with which an element of the adapter's input is dropped;
            the base term sees x whole. Pass 0 when not training. The mask is drawn from a seed
            that torch's generator gives, and drawn again in backward: none is stored.
        out_scale: g [N]: multiplies the whole output but the bias.
        mid_scale: d [r], between lora_A and lora_B.
        adapter_scale: b [N]: multiplies the adapter's part alone. Each vector is in x's dtype, or
            float32 over a half-precision base.
        drop_base: what dropout means beside out_scale. False: the formula above. True (DoRA's
            code, and peft's): y = x Wᵀ + (g − 1) ∘ (drop(x) Wᵀ) + g ∘ (s · …) + bias, at the price
            of a second base product. Without dropout the two are one.
        keep_output: what the gradient of out_scale is read from. True: y, which the next layer
            mostly keeps anyway. False: y is not kept, and backward computes what out_scale
            multiplied again, at the price of one more base product. Gradients agree to rounding.
            Where drop_base acts, it is not y but drop(x) Wᵀ + s · … that is kept, or computed
            again. It has no effect where out_scale needs no gradient.
        backend: 'triton', 'native', 'onednn' or 'eager'; None chooses (see ``fastlora.explain``).

    Under ``torch.autocast`` the call computes in autocast's dtype, as ``F.linear`` does. Gradients
    flow to whichever operands require them, in their own dtype, and only what these gradients need
    is kept: x for lora_A or weight; the [M, r] product for lora_B, mid_scale or adapter_scale; for
    out_scale all of these and, with keep_output, y itself, or, where the model changes y in place,
    one more base product (with drop_base under dropout a second [M, N] is kept instead);
    torch.compile keeps x and weight too where there are vectors. No second derivative. Under
    torch.func's transforms, forward-mode derivatives and torch.jit.trace, and for nested, fake and
    meta tensors, the same formula runs as ordinary differentiable PyTorch, which keeps what
    autograd does whatever keep_output says.

    A float32 call of at most four rows on a CPU is a few differentiable PyTorch calls whatever the
    backend: the same values, masks and gradients, but autograd keeps what it does, dropout's mask
    among it, whatever keep_output says, and there is a second derivative. The exception is 'native'
    where it has faster products (README.md): for a call without vectors, and for one with them and
    a large weight (rows · N · K of 2²⁰ and more).

    Returns:
        y [..., N] in the compute dtype.

    Raises:
        ValueError: shapes that do not fit, a rank below 1, dropout outside [0, 1), a scaling that
            is not finite, drop_base without out_scale, or tensors on different devices.
        TypeError: dtypes that are not floating or do not go together.
        BackendError: the backend asked for cannot run this call.
    """
    device = x.device
    autocast = autocasts(x)
    if autocast and x.dtype in AUTOCAST:
        dtype = torch.get_autocast_dtype(device.type)
        x, weight = x.to(dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
    check(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    scales = None
    vectors = out_scale is not None or mid_scale is not None or adapter_scale is not None
    if vectors or drop_base:
        scales = Scales(out_scale, mid_scale, adapter_scale)
        scales, drop_base = check_vectors(scales, x, lora_B, dropout_p, drop_base)
    arguments = (x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if torch.compiler.is_compiling():
        # registering operators imports dynamo and triton, so it waits until somebody compiles
        from fastlora.ops.adapter_linear.registered import compiled

        return compiled(*arguments, scales, drop_base, keep_output, backend)
    if is_transformed(x):
        return composite(*arguments, scales, drop_base)
    module = _backend.select("adapter_linear", BACKENDS, device, x.dtype, backend)
    rank = lora_A.shape[0] if scales is None else None
    if has_few_rows(x, module, weight.shape[0], rank):
        seed = module.draw_seed(device) if dropout_p > 0.0 else None
        y = module.few_rows(
            rows(x), weight, lora_A, lora_B, scaling, bias, dropout_p, seed, scales, drop_base
        )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
    if scales is not None:
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            return ScaledAdapterLinear.apply(
                *arguments[:5], *scales, *arguments[5:], drop_base, keep_output, module
            )
    if autocast:
        with torch.autocast(device.type, enabled=False):
            return _AdapterLinear.apply(*arguments, module)
    return _AdapterLinear.apply(*arguments, module)


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout_p: float,
        module: ModuleType,
    ) -> Tensor:
        needs = Needs(*ctx.needs_input_grad[:5])
        seed = module.draw_seed(x.device) if dropout_p > 0.0 else None
        y, t = module.forward(
            rows(x),
            weight,
            to(lora_A, x.dtype),
            to(lora_B, x.dtype),
            scaling,
            bias,
            dropout_p,
            seed,
            need_t=needs.lora_B,
        )
        ctx.save_for_backward(
            x if needs.lora_A or needs.weight else None,
            weight if needs.x else None,
            lora_A if needs.x else None,
            lora_B if needs.x or needs.lora_A else None,
            t,
            seed,
        )
        shape = None if x.dim() == 2 else x.shape
        dtypes = (lora_A.dtype, lora_B.dtype, None if bias is None else bias.dtype)
        seed_dim = None if seed is None else seed.dim()
        ctx.static = (shape, float(scaling), dropout_p, module, needs, seed_dim, dtypes)
        return y if shape is None else y.view(*shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, t, seed = ctx.saved_tensors
        shape, scaling, dropout_p, module, needs, seed_dim, dtypes = ctx.static
        check_mask(seed, seed_dim)
        dtype_A, dtype_B, dtype_bias = dtypes
        dx, dweight, dA, dB, dbias = module.backward(
            rows(dy),
            None if x is None else rows(x),
            weight,
            None if lora_A is None else to(lora_A, dy.dtype),
            None if lora_B is None else to(lora_B, dy.dtype),
            t,
            scaling,
            dropout_p,
            seed,
            needs,
        )
        return (
            dx if dx is None or shape is None else dx.view(shape),
            dweight,
            None if dA is None else to(dA, dtype_A),
            None if dB is None else to(dB, dtype_B),
            None if dbias is None else to(dbias, dtype_bias),
            None,
            None,
            None,
        )
