"""The best PyTorch-only form: two products a direction, everything else accumulated in place.

Steps are taken by name, so that other libraries can be put under the same code (onednn.py,
native.py): every product is ``linear(a, b) = a bᵀ``, the adapter goes onto a large product's result
by ``update``, all that backward reads off dY beside the large products comes from ``output_pass``,
and a dropout mask from ``draw``. Above these, ``output`` is a layer's y and ``gradient`` adds up
dx, for who can make several products in one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastlora.ops.adapter_linear.contract import Needs, Scales, doubtful
from fastlora.ops.dropout import Draw, Mask, keep_scale, stream_mask
from fastlora.ops.dropout import draw_seed as _draw_seed

_PIECE = 1 << 17  # elements
_PIECE_CUDA = 1 << 24
_LONGEST_SUM = 2048  # rows added up one by one in float32
_NARROW = 64  # a product of more ranks than that is as fast either way round

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Onto = Callable[[Tensor, Tensor, Tensor], object]  # out += a bᵀ, for a large b


class Update(Protocol):
    """out [m, n] ← scale ∘ (out + keep(a b)) + bias, in place, for a [m, r], b [r, n]."""

    def __call__(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        keep: Mask | None = None,
    ) -> object: ...


class Output(Protocol):
    """scale ∘ (x Wᵀ + t Cᵀ) + bias [M, N], for t [M, r], C [N, r]."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        t: Tensor,
        lora_B: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        linear: Linear,
        update: Update,
    ) -> Tensor: ...


class Gradient(Protocol):
    """dx [M, K] = Σ (dY ∘ g) W + Σ keep(H A), of which a term comes with every call."""

    def takes_scale(self, dy: Tensor, weight: Tensor) -> bool:
        """Whether ``add`` takes g as it is, and nobody has to multiply dY by it."""

    def add(self, dy: Tensor, weight: Tensor, scale: Tensor | None = None) -> object:
        """dY [M, N], W [N, K], g [N]; the first term is one of these."""

    def update(self, h: Tensor, lora_A: Tensor, keep: Mask | None = None) -> object:
        """H [M, r], A [r, K]."""

    def total(self) -> Tensor:
        """dx, after the last term."""


Gather = Callable[[Linear, Update], Gradient]


class Passed(NamedTuple):
    """What backward through y = g ∘ z + bias, z = x Wᵀ + t Cᵀ, reads off dY [M, N]."""

    dy: Tensor  # dY ∘ g in dY's dtype; dY itself where there is no g, or it need not be there
    h: Tensor | None  # factor · (dY ∘ g) C [M, r], where C was given
    dC: Tensor | None  # (dY ∘ g)ᵀ t [N, r], where t was given
    dg: Tensor | None  # [N], float32 or wider, where ``read`` was given
    unread: Tensor | None  # bool [N]: where dg cannot be read off y (``doubtful``); None: nowhere


class OutputPass(Protocol):
    """Gives ``Passed``; ``read`` is y, or z where ``is_y`` is False (then without a bias).

    ``need_dy``: the product dY ∘ g is wanted for itself; h and dC are of it either way.
    """

    def __call__(
        self,
        dy: Tensor,
        lora_B: Tensor | None,
        t: Tensor | None,
        factor: float,
        linear: Linear,
        *,
        out_scale: Tensor | None = None,
        need_dy: bool = True,
        read: Tensor | None = None,
        bias: Tensor | None = None,
        is_y: bool = True,
    ) -> Passed: ...


def draw_seed(device: torch.device) -> Tensor:
    """A seed [] int64 on the CPU, whatever the device: reading it must not wait for a GPU."""
    return _draw_seed("cpu")


def aten_linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [m, k] · b [n, k]ᵀ + bias [n]."""
    return torch.nn.functional.linear(a, b, bias)


def times(a: Tensor, scale: Tensor) -> Tensor:
    """a ∘ scale in a's dtype, where scale may be float32 over half precision."""
    return torch.mul(a, scale, out=torch.empty_like(a))


def add_product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Mask | None = None,
) -> None:
    """See ``Update``."""
    if keep is None:
        out.addmm_(a, b)
    else:
        out.add_(keep(a @ b))
    if scale is not None:
        scale_columns(out, scale, bias)
    elif bias is not None:
        out.add_(bias)


def scale_columns(y: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """y [M, N] ← y ∘ scale [N] + bias [N], in place and rounded once."""
    if bias is None:
        y.mul_(scale)
    else:
        torch.addcmul(bias, y, scale, out=y)


def add_output(
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    lora_B: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    linear: Linear,
    update: Update,
) -> Tensor:
    """See ``Output``."""
    if scale is None:
        y = linear(x, weight, bias)
        update(y, t, lora_B.t())
    else:
        y = linear(x, weight, None)
        update(y, t, lora_B.t(), scale, bias)
    return y


def aten_onto(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [m, n] += a [m, k] · b [n, k]ᵀ."""
    out.addmm_(a, b.t())


class InPlace:
    """See ``Gradient``: every term is added when it comes, the first of them a large one."""

    def __init__(self, linear: Linear, update: Update, onto: Onto = aten_onto) -> None:
        self._linear, self._update, self._onto = linear, update, onto
        self._dx: Tensor | None = None

    def takes_scale(self, dy: Tensor, weight: Tensor) -> bool:
        return False

    def add(self, dy: Tensor, weight: Tensor, scale: Tensor | None = None) -> None:
        own = dy if scale is None else times(dy, scale)
        if self._dx is None:
            self._dx = self._linear(own, weight.t(), None)
        else:
            self._onto(self._dx, own, weight.t())

    def update(self, h: Tensor, lora_A: Tensor, keep: Mask | None = None) -> None:
        assert self._dx is not None
        if keep is None:
            self._update(self._dx, h, lora_A)
        else:
            self._update(self._dx, h, lora_A, keep=keep)

    def total(self) -> Tensor:
        assert self._dx is not None
        return self._dx


def read_output(
    dy: Tensor,
    lora_B: Tensor | None,
    t: Tensor | None,
    factor: float,
    linear: Linear,
    *,
    out_scale: Tensor | None = None,
    need_dy: bool = True,
    read: Tensor | None = None,
    bias: Tensor | None = None,
    is_y: bool = True,
) -> Passed:
    """See ``OutputPass``."""
    own, h, dC, dg, unread = dy, None, None, None, None
    if out_scale is not None and (need_dy or lora_B is not None or t is not None):
        own = times(dy, out_scale)
    if lora_B is not None:
        h = linear(own, lora_B.t(), None).mul_(factor)
    if t is not None:
        dC = _weight_gradient(linear, own, t)
    if read is not None:
        assert out_scale is not None
        dg, mean_square = _column_dots(dy, read, bias)
        if is_y:
            unread = doubtful(out_scale, bias, mean_square, dy.dtype)
            unread = unread if unread.any() else None
            dg.div_(out_scale)
    return Passed(own, h, dC, dg, unread)


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
    update: Update = add_product,
    output: Output = add_output,
    draw: Draw = stream_mask,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and t = s · drop(x) Aᵀ [M, r], all in x's dtype (t only if ``need_t``)."""
    t = _down(x, lora_A, scaling, dropout_p, seed, linear, draw)
    y = output(x, weight, t, lora_B, None, bias, linear, update)
    return y, t if need_t else None


def _down(
    x: Tensor,
    lora_A: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    linear: Linear,
    draw: Draw,
) -> Tensor:
    if seed is None:
        return linear(x, lora_A, None).mul_(scaling)
    mask = draw((x.shape[0], x.shape[1]), dropout_p, seed, x.device)
    return linear(mask(x), lora_A, None).mul_(scaling * keep_scale(dropout_p))


def few_rows(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scales: Scales | None = None,
    drop_base: bool = False,
    draw: Draw = stream_mask,
) -> Tensor:
    """y [M, N] as differentiable PyTorch: the same values, mask and gradients as ``forward`` and
    ``backward`` without a Function of ours, which for few rows costs more than all products."""
    dropped = x
    if seed is not None:
        keep = draw((x.shape[0], x.shape[1]), dropout_p, seed, x.device)
        dropped = x * keep(x.new_full(x.shape, keep_scale(dropout_p)))
    return _formula(x, dropped, weight, lora_A, lora_B, bias, scaling, scales, drop_base)


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
    dtype = x.dtype
    if scales is not None:
        scales = Scales(*(None if scale is None else scale.to(dtype) for scale in scales))
    dropped = torch.nn.functional.dropout(x, dropout_p) if dropout_p > 0.0 else x
    small = lora_A.to(dtype), lora_B.to(dtype)
    return _formula(x, dropped, weight, *small, bias, scaling, scales, drop_base)


def _formula(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    scales: Scales | None,
    drop_base: bool,
) -> Tensor:
    linear = torch.nn.functional.linear
    g, d, b = scales or Scales(None, None, None)
    t = linear(dropped, lora_A)
    update = linear(t if d is None else t * d, lora_B)
    if b is not None:
        update = update * b
    if g is None:
        return torch.add(linear(x, weight, bias), update, alpha=scaling)
    z = torch.add(linear(dropped if drop_base else x, weight), update, alpha=scaling)
    if drop_base:
        plain = torch.add(linear(x, weight, bias), update, alpha=scaling)
        return torch.addcmul(plain, z, g - 1)
    return z * g if bias is None else torch.addcmul(bias, z, g)


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
    update: Update = add_product,
    output_pass: OutputPass = read_output,
    gradient: Gather = InPlace,
    draw: Draw = stream_mask,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dA, dB, dbias) for dy [M, N]; None where ``needs`` does not ask.

    x is needed for dA and dweight only, t for dB, weight and lora_A for dx, lora_B for dx and dA:
    each may be None where no gradient asked for needs it. dA, dB and dbias may come back in dy's
    dtype or in float32; the caller casts them to the parameter's.
    """
    passed = output_pass(
        dy,
        lora_B if needs.x or needs.lora_A else None,
        t if needs.lora_B else None,
        scaling * keep_scale(dropout_p),
        linear,
    )
    dx, dweight, dA = _to_input(
        dy, None, passed, x, weight, lora_A, dropout_p, seed, needs, linear,
        gradient(linear, update), draw,
    )  # fmt: skip
    dbias = None
    if needs.bias:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return dx, dweight, dA, passed.dC, dbias


def _to_input(
    dy: Tensor,
    out_scale: Tensor | None,
    passed: Passed,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
    linear: Linear,
    gradient: Gradient,
    draw: Draw,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dA) from dY, g and what was read off dY."""
    dx = dweight = dA = None
    mask: Mask | None = None
    h = passed.h
    if seed is not None and h is not None:
        wide = lora_A if x is None else x
        assert wide is not None
        mask = draw((dy.shape[0], wide.shape[1]), dropout_p, seed, dy.device)
    if needs.lora_A:
        assert x is not None and h is not None
        dA = reduce(linear, h, x if mask is None else mask(x))
    if needs.x:
        assert weight is not None and lora_A is not None and h is not None
        add_scaled(gradient, dy, passed, weight, out_scale)
        gradient.update(h, lora_A, mask)
        dx = gradient.total()
    if needs.weight:
        assert x is not None
        dweight = linear(passed.dy.t(), x.t(), None)
    return dx, dweight, dA


def add_scaled(
    gradient: Gradient, dy: Tensor, passed: Passed, weight: Tensor, out_scale: Tensor | None
) -> None:
    """(dY ∘ g) W onto dx, for dY as it came in where g can be left to ``gradient``."""
    if out_scale is not None and gradient.takes_scale(dy, weight):
        gradient.add(dy, weight, out_scale)
    else:
        gradient.add(passed.dy, weight)


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
    update: Update = add_product,
    output: Output = add_output,
    draw: Draw = stream_mask,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = g ∘ (x Wᵀ + t Bᵀ) + bias [M, N], t as in ``forward``, and None.

    With ``drop_base`` (there is a seed then) y = x Wᵀ + t Bᵀ + bias + (g − 1) ∘ z, where z =
    drop(x) Wᵀ + t Bᵀ [M, N] is the third result if ``need_z``. out_scale g [N] may be float32.
    """
    if not drop_base:
        t = _down(x, lora_A, scaling, dropout_p, seed, linear, draw)
        y = output(x, weight, t, lora_B, out_scale, bias, linear, update)
        return y, t if need_t else None, None
    assert seed is not None
    mask = draw((x.shape[0], x.shape[1]), dropout_p, seed, x.device)
    dropped = mask(x).mul_(keep_scale(dropout_p))
    t = linear(dropped, lora_A, None).mul_(scaling)
    y = output(x, weight, t, lora_B, None, bias, linear, update)
    z = output(dropped, weight, t, lora_B, None, None, linear, update)
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
    update: Update = add_product,
    output_pass: OutputPass = read_output,
    gradient: Gather = InPlace,
    draw: Draw = stream_mask,
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
        scale = keep_scale(dropout_p)
        again = need_out_scale and read is None
        mask: Mask | None = None
        dropped: Tensor | None = None
        if needs.x or needs.lora_A or needs.weight or again:
            assert seed is not None
            wide = lora_A if x is None else x
            assert wide is not None
            mask = draw((dy.shape[0], wide.shape[1]), dropout_p, seed, dy.device)
        if needs.lora_A or needs.weight or again:
            assert x is not None and mask is not None
            dropped = mask(x)
        if again:
            assert dropped is not None
            assert weight is not None and lora_B is not None and t is not None
            read = linear(dropped, weight, None).mul_(scale)
            update(read, t, lora_B.t())
        passed = output_pass(
            dy,
            lora_B if needs.x or needs.lora_A else None,
            t if needs.lora_B else None,
            scaling * scale,
            linear,
            out_scale=out_scale,
            need_dy=False,
            read=read if need_out_scale else None,
            is_y=False,
        )
        dx, dweight, dA = _drop_base_to_input(
            dy, passed.h, x, dropped, weight, lora_A, scale, mask, needs, out_scale, linear,
            gradient(linear, update),
        )  # fmt: skip
        dB, dg = passed.dC, passed.dg
    else:
        own = gradient(linear, update)
        passed = scaled_pass(
            dy, read, out_scale, bias, x, weight, lora_B, t, scaling * keep_scale(dropout_p),
            needs.x, needs.weight, needs.lora_A, needs.lora_B, need_out_scale, linear, output_pass,
            own,
        )  # fmt: skip
        dx, dweight, dA = _to_input(
            dy, out_scale, passed, x, weight, lora_A, dropout_p, seed, needs, linear, own, draw
        )
        dB, dg = passed.dC, passed.dg
    if needs.bias:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return dx, dweight, dA, dB, dbias, dg


def scaled_pass(
    dy: Tensor,
    y: Tensor | None,
    out_scale: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    lora_B: Tensor | None,
    t: Tensor | None,
    factor: float,
    need_x: bool,
    need_weight: bool,
    need_A: bool,
    need_B: bool,
    need_out_scale: bool,
    linear: Linear,
    output_pass: OutputPass,
    gradient: Gradient,
) -> Passed:
    """``output_pass`` of y = g ∘ (x Wᵀ + t Bᵀ) + bias for these needs, dx by ``gradient``.

    dg is read off y except where it does not show it. Without y what g multiplied is computed
    again, for every column; for either x, weight, lora_B and t must be there.
    """
    read = y
    if need_out_scale and y is None:
        assert x is not None and weight is not None and lora_B is not None and t is not None
        read = linear(x, weight, None)
        read.addmm_(t, lora_B.t())
    product = need_weight
    if need_x and not product:
        assert weight is not None
        product = not gradient.takes_scale(dy, weight)
    passed = output_pass(
        dy,
        lora_B if need_x or need_A else None,
        t if need_B else None,
        factor,
        linear,
        out_scale=out_scale,
        need_dy=product,
        read=read if need_out_scale else None,
        bias=None if y is None else bias,
        is_y=y is not None,
    )
    if passed.unread is not None:
        assert x is not None and weight is not None and lora_B is not None and t is not None
        assert passed.dg is not None
        columns = passed.unread.nonzero().squeeze(1)
        z = linear(x, weight[columns], None)
        z.t().addmm_(lora_B[columns], t.t())
        passed.dg[columns], _ = _column_dots(dy[:, columns], z)
    return passed


def _drop_base_to_input(
    dy: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    dropped: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    scale: float,
    mask: Mask | None,
    needs: Needs,
    out_scale: Tensor,
    linear: Linear,
    gradient: Gradient,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dA) where dropout reaches the base's scaled part too: h is that of the pass,
    dropped the ``mask`` of x, scale what it is to be multiplied by."""
    dx = dweight = dA = None
    extra = less_one(out_scale, dy.dtype)  # g − 1
    if needs.lora_A:
        assert h is not None and dropped is not None
        dA = reduce(linear, h, dropped)
    if needs.weight:
        assert x is not None and dropped is not None
        dweight = linear(dy.t(), x.t(), None)
        dweight.addcmul_(linear(dy.t(), dropped.t(), None), extra[:, None], value=scale)
    if needs.x:
        assert weight is not None and lora_A is not None and h is not None and mask is not None
        gradient.add(dy, weight, extra * scale)
        gradient.update(h, lora_A)
        dx = linear(dy, weight.t(), None).add_(mask(gradient.total()))
    return dx, dweight, dA


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


def _weight_gradient(linear: Linear, dy: Tensor, t: Tensor) -> Tensor:
    """dyᵀ t [N, r]; of a large rank with its rows contiguous, for what follows."""
    if dy.is_cpu and t.shape[1] > _NARROW:
        return linear(dy.t(), t.t(), None)
    return reduce(linear, t, dy).t()


def reduce(linear: Linear, small: Tensor, wide: Tensor) -> Tensor:
    """smallᵀ wide: [M, r], [M, K] → [r, K], summed over tokens; float32 where that is free."""
    if wide.is_cuda and wide.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(small.t(), wide, out_dtype=torch.float32)
    return linear(small.t(), wide.t(), None)
