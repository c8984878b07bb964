"""The best PyTorch-only form: two products a direction, everything else accumulated in place.

Every product is written as ``linear(a, b) = a bᵀ`` so that another GEMM library can be put under
the same code (see onednn.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops.adapter_linear.contract import Needs
from fastlora.ops.dropout import draw_seed as _draw_seed
from fastlora.ops.dropout import drop, keep_scale, stream_noise

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def draw_seed(device: torch.device) -> Tensor:
    """A seed [] int64 on the CPU, whatever the device: reading it must not wait for a GPU."""
    return _draw_seed("cpu")


def aten_linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [m, k] · b [n, k]ᵀ + bias [n]."""
    return torch.nn.functional.linear(a, b, bias)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    *,
    need_t: bool,
    linear: Linear = aten_linear,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and t = s · drop(x) Aᵀ [M, r], all in x's dtype (t only if ``need_t``)."""
    if seed is not None:
        noise = stream_noise((x.shape[0], x.shape[1]), seed, x.device)
        t = linear(drop(x, noise, dropout_p), lora_A, None).mul_(scaling * keep_scale(dropout_p))
    else:
        t = linear(x, lora_A, None).mul_(scaling)
    y = linear(x, weight, bias)
    y.addmm_(t, lora_B.t())
    return y, t if need_t else None


def composite(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """y [..., N] from differentiable PyTorch calls, for what a custom Function cannot go through.

    Takes x with its leading dimensions; the mask is drawn, and kept, by ``F.dropout``.
    """
    dropped = torch.nn.functional.dropout(x, dropout_p) if dropout_p > 0.0 else x
    t = torch.nn.functional.linear(dropped, lora_A.to(x.dtype))
    update = torch.nn.functional.linear(t, lora_B.to(x.dtype))
    return torch.nn.functional.linear(x, weight, bias) + scaling * update


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    t: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
    *,
    linear: Linear = aten_linear,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dA, dB, dbias) for dy [M, N]; None where ``needs`` does not ask.

    x is needed for dA and dweight only, t for dB, weight and lora_A for dx, lora_B for dx and dA:
    each may be None where no gradient asked for needs it. dA, dB and dbias may come back in dy's
    dtype or in float32; the caller casts them to the parameter's.
    """
    dx = dweight = dA = dB = dbias = None
    h = noise = None
    if needs.x or needs.lora_A:
        assert lora_B is not None
        h = linear(dy, lora_B.t(), None).mul_(scaling * keep_scale(dropout_p))  # [M, r]
        if seed is not None:
            wide = lora_A if x is None else x
            assert wide is not None
            noise = stream_noise((dy.shape[0], wide.shape[1]), seed, dy.device)
    if needs.lora_B:
        assert t is not None
        dB = _reduce(linear, t, dy).t()
    if needs.lora_A:
        assert x is not None and h is not None
        dA = _reduce(linear, h, x if noise is None else drop(x, noise, dropout_p))
    if needs.x:
        assert weight is not None and lora_A is not None and h is not None
        dx = linear(dy, weight.t(), None)
        if noise is None:
            dx.addmm_(h, lora_A)
        else:
            dx.add_(drop(linear(h, lora_A.t(), None), noise, dropout_p))
    if needs.weight:
        assert x is not None
        dweight = linear(dy.t(), x.t(), None)
    if needs.bias:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return dx, dweight, dA, dB, dbias


def _reduce(linear: Linear, small: Tensor, wide: Tensor) -> Tensor:
    """smallᵀ wide: [M, r], [M, K] → [r, K], summed over tokens; float32 where that is free."""
    if wide.is_cuda and wide.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(small.t(), wide, out_dtype=torch.float32)
    return linear(small.t(), wide.t(), None)
