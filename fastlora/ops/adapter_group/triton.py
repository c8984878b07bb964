"""The Triton backend: the kernels of ``adapter_linear``, launched for a whole group.

Without dropout the lora_A are one [Σ r, K] matrix: one launch reads x for every t, one for every
dA, and dx starts as one product H A of rank Σ r, onto which each dY W is added. Layouts are those
of adapter_linear/triton.py; derivation and traffic: this folder's README.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.ops.adapter_group import eager
from fastlora.ops.adapter_group.contract import (
    Gradients,
    Needs,
    Part,
    Slot,
    common_scaling,
    together,
)
from fastlora.ops.adapter_linear import eager as plain_eager
from fastlora.ops.adapter_linear import tiles
from fastlora.ops.adapter_linear import triton as kernels

draw_seed = kernels.draw_seed

# Ranks beyond this are cut in tiles, which can be read 16 bytes at a time if it divides them.
_RANK_TILE = 16


def forward(
    x: Tensor, slots: Sequence[Slot], parts: Sequence[Part], need_t: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(y [M, N] of every part, t [M, r] of every slot, None unless ``need_t``), in x's dtype."""
    if 0 in x.shape or any(part.weight is None or 0 in part.weight.shape for part in parts):
        return eager.forward(x, slots, parts, need_t)  # nothing to launch, or nothing to sum over
    ys = []
    with kernels.on_device(x):
        ts = _down(x, slots, need_t)
        for part in parts:
            assert part.weight is not None and part.lora_B is not None
            t, weight, up = ts[part.slot], part.weight.t(), part.lora_B.t()
            g = None if part.out_scale is None else part.out_scale.contiguous()
            if g is None:
                ys.append(kernels.up(x, weight, t, up, part.bias, "forward"))
            elif _is_fused("forward", x, weight.shape[1], x.shape[1], t.shape[1]):
                ys.append(kernels.main(x, weight, t, up, part.bias, 0, None, scale_out=g))
            else:
                y = torch.mm(t, up).addmm_(x, weight)
                plain_eager.scale_columns(y, g, part.bias)
                ys.append(y)
    return ys, eager.kept(ts, slots, need_t)


def _is_fused(part: str, x: Tensor, n: int, k: int, r: int) -> bool:
    """Whether ``part``'s product of x [M, ...] and a weight [n, k] goes through ``main``."""
    arch = kernels.arch_of(x.device)
    return tiles.algorithm(part, x.dtype, x.shape[0], n, k, r, arch) == "fused"


def _down(x: Tensor, slots: Sequence[Slot], need_t: Sequence[bool]) -> list[Tensor]:
    """t [M, r] of every slot: views of one product for those without dropout."""
    ts: dict[int, Tensor] = {}
    for index, slot in enumerate(slots):
        if slot.seed is not None:
            assert slot.lora_A is not None
            level = kernels.level_of(slot.dropout_p, slot.seed)
            ts[index] = kernels.shrink(x, slot.lora_A, slot.scaling, level, slot.seed)
    plain = together(slots, [True] * len(slots), need_t)
    if plain:
        own = [slots[index] for index in plain]
        scaling = common_scaling(own)
        t = kernels.shrink(x, _stacked(own), 1.0 if scaling is None else scaling, 0, None)
        begin = 0
        for index, slot in zip(plain, own, strict=True):
            ts[index] = t[:, begin : begin + slot.rank]
            begin += slot.rank
            if scaling is None:
                ts[index].mul_(slot.scaling)
    return [ts[index] for index in range(len(slots))]


def _padding(ranks: Sequence[int]) -> int:
    """Ranks to add to Σ r, so that a tile of ranks can be read 16 bytes at a time."""
    total = sum(ranks)
    return -total % _RANK_TILE if len(ranks) > 1 and total > _RANK_TILE else 0


def _stacked(slots: Sequence[Slot]) -> Tensor:
    """Their lora_A as one [Σ r, K] matrix, with rows of zeros after them where that helps."""
    matrices = [slot.lora_A for slot in slots if slot.lora_A is not None]
    if len(matrices) == 1:
        return matrices[0]
    if rows := _padding([slot.rank for slot in slots]):
        matrices.append(matrices[0].new_zeros((rows, matrices[0].shape[1])))
    return torch.cat(matrices)


def _beside(hs: list[Tensor]) -> Tensor:
    """H [M, r] of several slots as one [M, Σ r], with columns of zeros as ``_stacked`` has rows."""
    if len(hs) == 1:
        return hs[0]
    if columns := _padding([h.shape[1] for h in hs]):
        hs = [*hs, hs[0].new_zeros((hs[0].shape[0], columns))]
    return torch.cat(hs, 1)


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    slots: Sequence[Slot],
    parts: Sequence[Part],
    ts: Sequence[Tensor | None],
    need_x: bool,
    need_A: Sequence[bool],
    needs: Sequence[Needs],
) -> tuple[Tensor | None, list[Tensor | None], list[Gradients]]:
    """(dx, dA of every slot, the rest of every part) for dys [M, N]; None where not asked for.

    Operands that no gradient asked for needs may be None, as in eager.py. dx and dweight come in
    dy's dtype, the others in fp32.
    """
    wide = x if x is not None else slots[0].lora_A
    if any(0 in dy.shape for dy in dys) or (wide is not None and 0 in wide.shape):
        return eager.backward(dys, x, slots, parts, ts, need_x, need_A, needs)
    # an expanded scalar, as from y.sum(): cheaper to write than to read so
    dys = [dy.contiguous() if 0 in dy.stride() else dy for dy in dys]
    want_h = [need_x or need for need in need_A]
    hs: dict[int, Tensor] = {}
    gradients = []
    with kernels.on_device(dys[0]):
        for dy, part, need in zip(dys, parts, needs, strict=True):
            h, own = _of_part(dy, x, part, slots[part.slot], ts[part.slot], need, want_h)
            gradients.append(own)
            if h is not None:
                hs[part.slot] = hs[part.slot].add_(h) if part.slot in hs else h
        dAs: list[Tensor | None] = [None] * len(slots)
        for index, slot in enumerate(slots):
            if slot.seed is not None and need_A[index]:
                assert x is not None
                level = kernels.level_of(slot.dropout_p, slot.seed)
                dAs[index] = kernels.bwd_da(hs[index], x, level, slot.seed)
        plain = together(slots, want_h, need_A)  # those whose lora_A trains come first
        trained = sum(need_A[index] for index in plain)
        h = _beside([hs[index] for index in plain]) if plain else None
        if trained:
            assert x is not None and h is not None
            width = sum(slots[index].rank for index in plain[:trained])
            dA = kernels.bwd_da(h if trained == len(plain) else h[:, :width], x, 0, None)
            begin = 0
            for index in plain[:trained]:
                dAs[index] = dA[begin : begin + slots[index].rank]
                begin += slots[index].rank
        dx = _dx(dys, slots, parts, plain, h, hs) if need_x else None
    return dx, dAs, gradients


def _of_part(
    dy: Tensor,
    x: Tensor | None,
    part: Part,
    slot: Slot,
    t: Tensor | None,
    need: Needs,
    want_h: Sequence[bool],
) -> tuple[Tensor | None, Gradients]:
    """(H [M, r] of one part if wanted, its gradients but dA), from one read of dY."""
    g = None if part.out_scale is None else part.out_scale.contiguous()
    dC = dweight = dbias = dg = h = None
    lora_B = None
    if want_h[part.slot]:
        assert part.lora_B is not None
        # with g it is dYg C = dY (g ∘ C) that is wanted
        lora_B = part.lora_B if g is None else plain_eager.times(part.lora_B, g[:, None])
    own_t = t if need.lora_B or need.out_scale else None
    if need.out_scale or lora_B is not None or own_t is not None:
        level = kernels.level_of(slot.dropout_p, slot.seed)
        y = part.y if need.out_scale else None
        bias = part.bias if need.out_scale else None
        scale = kernels.total_scale(slot.scaling, level)
        h, product, dots = kernels.bwd_dy(dy, lora_B, own_t, scale, y, bias)
        if need.lora_B:
            assert product is not None
            dC = product if g is None else product * g[:, None]
        if need.out_scale:
            assert x is not None and part.weight is not None and part.lora_B is not None
            assert product is not None and g is not None
            dg = kernels.out_scale_gradient(
                dy, dots, product, g, part.bias, x, part.weight, part.lora_B
            )
    if need.weight:
        assert x is not None
        dweight = torch.mm(dy.t(), x)
        if g is not None:
            dweight.mul_(g[:, None])
    if need.bias:
        dbias = dy.sum(0, dtype=torch.float32)
    return h, Gradients(dweight, dC, dbias, dg)


def _dx(
    dys: Sequence[Tensor],
    slots: Sequence[Slot],
    parts: Sequence[Part],
    plain: Sequence[int],
    h: Tensor | None,
    hs: dict[int, Tensor],
) -> Tensor:
    """dx [M, K] = Σ dYg W + H A of the slots without dropout + Σ mask ∘ (H A) of the others.

    h [M, Σ r] is that of the former, in the order ``plain``.
    """
    dx: Tensor | None = None
    rest = list(zip(dys, parts, strict=True))
    if h is not None:
        # one base product may start as H A: the first that has no mask to come
        first = next(i for i, (_, part) in enumerate(rest) if slots[part.slot].seed is None)
        stacked = _stacked([slots[index] for index in plain])
        dx = _onto_product(*rest.pop(first), h, stacked, 0, None)
    for dy, part in rest:
        slot = slots[part.slot]
        lora_A, level = slot.lora_A, kernels.level_of(slot.dropout_p, slot.seed)
        assert lora_A is not None and part.weight is not None
        if dx is None:
            dx = _onto_product(dy, part, hs[part.slot], lora_A, level, slot.seed)
            continue
        if level:
            dx.add_(kernels.main(None, None, hs[part.slot], lora_A, None, level, slot.seed))
        dx.addmm_(_scaled(dy, part), part.weight)
    assert dx is not None
    return dx


def _scaled(dy: Tensor, part: Part) -> Tensor:
    """dY ∘ g."""
    return dy if part.out_scale is None else plain_eager.times(dy, part.out_scale)


def _onto_product(
    dy: Tensor, part: Part, h: Tensor, lora_A: Tensor, level: int, seed: Tensor | None
) -> Tensor:
    """mask ∘ (h A) + dYg W [M, K] by the algorithm of dx."""
    weight = part.weight
    assert weight is not None
    (n, k), r = weight.shape, lora_A.shape[0]
    if _is_fused("dx", dy, n, k, r):
        g = None if part.out_scale is None else part.out_scale.contiguous()
        return kernels.main(dy, weight, h, lora_A, None, level, seed, scale_in=g)
    dx = kernels.main(None, None, h, lora_A, None, level, seed) if level else h @ lora_A
    return dx.addmm_(_scaled(dy, part), weight)
