"""The best PyTorch-only form: two products a direction, everything else accumulated in place.

Every product is written as ``linear(a, b) = a bᵀ`` so that another GEMM library can be put under
the same code (see onednn.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops.adapter_linear.contract import Needs, Scales, doubtful
from fastlora.ops.dropout import draw_seed as _draw_seed
from fastlora.ops.dropout import drop, keep_scale, stream_noise

_PIECE = 1 << 17  # elements
_PIECE_CUDA = 1 << 24
_LONGEST_SUM = 2048  # rows added up one by one in float32

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
    scales: Scales | None = None,
    drop_base: bool = False,
) -> Tensor:
    """y [..., N] from differentiable PyTorch calls, for what a custom Function cannot go through.

    Takes x with its leading dimensions; the mask is drawn, and kept, by ``F.dropout``.
    """
    linear = torch.nn.functional.linear
    g, d, b = (
        None if scale is None else scale.to(x.dtype) for scale in scales or Scales(None, None, None)
    )
    dropped = torch.nn.functional.dropout(x, dropout_p) if dropout_p > 0.0 else x
    t = linear(dropped, lora_A.to(x.dtype))
    update = scaling * linear(t if d is None else t * d, lora_B.to(x.dtype))
    if b is not None:
        update = update * b
    y = linear(x, weight)
    if g is None:
        y = y + update
    elif drop_base:
        y = y + (g - 1) * linear(dropped, weight) + g * update
    else:
        y = g * (y + update)
    return y if bias is None else y + bias


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
        dB = reduce(linear, t, dy).t()
    if needs.lora_A:
        assert x is not None and h is not None
        dA = reduce(linear, h, x if noise is None else drop(x, noise, dropout_p))
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


def scaled_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    *,
    out_scale: Tensor,
    drop_base: bool,
    need_t: bool,
    need_z: bool,
    linear: Linear = aten_linear,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = g ∘ (x Wᵀ + t Bᵀ) + bias [M, N], t as in ``forward``, and None.

    With ``drop_base`` (there is a seed then) y = x Wᵀ + t Bᵀ + bias + (g − 1) ∘ z, where z =
    drop(x) Wᵀ + t Bᵀ [M, N] is the third result if ``need_z``. out_scale g [N] may be float32.
    """
    if not drop_base:
        y, t = forward(
            x, weight, lora_A, lora_B, scaling, None, dropout_p, seed, need_t=need_t, linear=linear
        )
        scale_columns(y, out_scale, bias)
        return y, t, None
    assert seed is not None
    noise = stream_noise((x.shape[0], x.shape[1]), seed, x.device)
    dropped = drop(x, noise, dropout_p).mul_(keep_scale(dropout_p))
    t = linear(dropped, lora_A, None).mul_(scaling)
    y = linear(x, weight, bias)
    y.t().addmm_(lora_B, t.t())
    z = linear(dropped, weight, None)
    z.t().addmm_(lora_B, t.t())
    y.addcmul_(z, less_one(out_scale, x.dtype))
    return y, t if need_t else None, z if need_z else None


def scaled_backward(
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
    out_scale: Tensor,
    drop_base: bool,
    bias: Tensor | None,
    read: Tensor | None,
    need_out_scale: bool,
    linear: Linear = aten_linear,
) -> tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]:
    """(dx, dweight, dA, dB, dbias, dg) of ``scaled_forward``; dg [N] if ``need_out_scale``.

    dg is read from ``read``: y, for which x, weight, lora_B, t and the bias (if there was one) must
    come too; with ``drop_base`` z, which suffices. Without either, x, weight, lora_B and t do, from
    which z is computed again. The rest is as in ``backward``.
    """
    dx = dweight = dA = dB = dbias = dg = None
    if drop_base:
        dx, dweight, dA, dB = _drop_base_backward(
            dy, x, weight, lora_A, lora_B, t, scaling, dropout_p, seed, needs, out_scale, linear
        )
    elif needs.x or needs.weight or needs.lora_A or needs.lora_B:
        dx, dweight, dA, dB, _ = backward(
            times(dy, out_scale),
            x,
            weight,
            lora_A,
            lora_B,
            t,
            scaling,
            dropout_p,
            seed,
            needs._replace(bias=False),
            linear=linear,
        )
    if needs.bias:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    if need_out_scale:
        if drop_base:
            assert read is not None
            dg, _ = _column_dots(dy, read)
        else:
            assert x is not None and weight is not None and lora_B is not None and t is not None
            dg = out_scale_gradient(dy, read, out_scale, bias, x, weight, lora_B, t, linear)
    return dx, dweight, dA, dB, dbias, dg


def out_scale_gradient(
    dy: Tensor,
    y: Tensor | None,
    out_scale: Tensor,
    bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    lora_B: Tensor,
    t: Tensor,
    linear: Linear,
) -> Tensor:
    """dg [N] of y = g ∘ (x Wᵀ + t Bᵀ) + bias, read off y except where it does not show it.

    Without y what g multiplied is computed again, for every column.
    """
    if y is None:
        z = linear(x, weight, None)
        z.t().addmm_(lora_B, t.t())
        return _column_dots(dy, z)[0]
    dg, mean_square = _column_dots(dy, y, bias)
    dg.div_(out_scale)
    unread = doubtful(out_scale, bias, mean_square, dy.dtype)
    if unread.any():
        columns = unread.nonzero().squeeze(1)
        z = linear(x, weight[columns], None)
        z.t().addmm_(lora_B[columns], t.t())
        dg[columns], _ = _column_dots(dy[:, columns], z)
    return dg


def _drop_base_backward(
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
    out_scale: Tensor,
    linear: Linear,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dA, dB) where dropout reaches the base's scaled part too."""
    dx = dweight = dA = dB = h = noise = dropped = None
    scale = keep_scale(dropout_p)
    extra = less_one(out_scale, dy.dtype)  # g − 1
    if needs.lora_B:
        assert t is not None
        dB = reduce(linear, t, dy).t() * out_scale[:, None]
    if needs.x or needs.lora_A:
        assert lora_B is not None
        h = linear(dy, times(lora_B, out_scale[:, None]).t(), None).mul_(scaling * scale)
    if needs.x or needs.lora_A or needs.weight:
        assert seed is not None
        wide = lora_A if x is None else x
        assert wide is not None
        noise = stream_noise((dy.shape[0], wide.shape[1]), seed, dy.device)
    if needs.lora_A or needs.weight:
        assert x is not None and noise is not None
        dropped = drop(x, noise, dropout_p)
    if needs.lora_A:
        assert h is not None and dropped is not None
        dA = reduce(linear, h, dropped)
    if needs.weight:
        assert x is not None and dropped is not None
        dweight = linear(dy.t(), x.t(), None)
        dweight.addcmul_(linear(dy.t(), dropped.t(), None), extra[:, None], value=scale)
    if needs.x:
        assert weight is not None and lora_A is not None and h is not None and noise is not None
        past = linear(times(dy, extra * scale), weight.t(), None)
        past.t().addmm_(lora_A.t(), h.t())
        dx = linear(dy, weight.t(), None).add_(drop(past, noise, dropout_p))
    return dx, dweight, dA, dB


def scale_columns(y: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """y [M, N] ← y ∘ scale [N] + bias [N], in place and rounded once."""
    if bias is None:
        y.mul_(scale)
    else:
        torch.addcmul(bias, y, scale, out=y)


def times(a: Tensor, scale: Tensor) -> Tensor:
    """a ∘ scale in a's dtype, where scale may be float32 over half precision."""
    return torch.mul(a, scale, out=torch.empty_like(a))


def less_one(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale − 1 in ``dtype``, rounded after the subtraction: what is left may be small."""
    return (scale.to(torch.promote_types(scale.dtype, torch.float32)) - 1).to(dtype)


def _norm_weight_gradient(dy: Tensor, y: Tensor) -> Tensor:
    """Σ_rows dY ∘ y [N] as the gradient of a layer norm's weight, whose normalised input is y: the
    one form of this sum that PyTorch has as a single pass, half the time of two."""
    rows, columns = dy.shape
    mean, one = dy.new_zeros(rows, 1), dy.new_ones(rows, 1)
    _, sums, _ = torch.ops.aten.native_layer_norm_backward(
        dy, y, [columns], mean, one, dy.new_empty(columns), None, [False, True, False]
    )
    return sums


def _column_dots(dy: Tensor, y: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Over the rows of [M, N], the sum of dY ∘ (y − bias) and, if there is a bias, the mean of
    (y − bias)²: [N] each, float32 or wider, in pieces that a cache can hold.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    dots = dy.new_zeros(dy.shape[1], dtype=wide)
    if bias is None and dy.is_cpu and dy.dtype == wide and dy.is_contiguous():
        for own, other in zip(dy.split(_LONGEST_SUM), y.split(_LONGEST_SUM), strict=True):
            dots += _norm_weight_gradient(own, other)
        return dots, None
    squares = None if bias is None else torch.zeros_like(dots)
    piece = max(1, (_PIECE_CUDA if dy.is_cuda else _PIECE) // max(1, dy.shape[1]))
    for own, other in zip(dy.split(piece), y.split(piece), strict=True):
        if bias is not None:
            assert squares is not None
            other = other.to(wide) - bias
            squares += other.square().sum(0)
        dots += torch.mul(own.to(wide), other).sum(0)
    return dots, None if squares is None else squares.div_(max(1, dy.shape[0]))


def reduce(linear: Linear, small: Tensor, wide: Tensor) -> Tensor:
    """smallᵀ wide: [M, r], [M, K] → [r, K], summed over tokens; float32 where that is free."""
    if wide.is_cuda and wide.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(small.t(), wide, out_dtype=torch.float32)
    return linear(small.t(), wide.t(), None)
