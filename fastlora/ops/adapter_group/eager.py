"""The best PyTorch-only form: x is read once for all lora_A, dx is one accumulator.

Products are written as ``linear(a, b) = a bᵀ`` and ``onto(out, a, b)``, out += a bᵀ, so that
another GEMM library can be put under the same code (see onednn.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastlora.ops.adapter_group.contract import (
    Gradients,
    Needs,
    Part,
    Slot,
    common_scaling,
    together,
)
from fastlora.ops.adapter_linear import eager
from fastlora.ops.adapter_linear.eager import Linear, aten_linear
from fastlora.ops.dropout import drop, keep_scale, stream_noise

draw_seed = eager.draw_seed


class Onto(Protocol):
    def __call__(
        self, out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, fresh: bool = False
    ) -> None:
        """out [m, n] += alpha · a [m, k] b [n, k]ᵀ; ``fresh``: out holds nothing yet."""


def aten_onto(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, fresh: bool = False) -> None:
    """out [m, n] += alpha · a [m, k] b [n, k]ᵀ; ``fresh``: out holds nothing yet."""
    out.addmm_(a, b.t(), beta=0.0 if fresh else 1.0, alpha=alpha)


def forward(
    x: Tensor,
    slots: Sequence[Slot],
    parts: Sequence[Part],
    need_t: Sequence[bool],
    *,
    linear: Linear = aten_linear,
    onto: Onto = aten_onto,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(y [M, N] of every part, t [M, r] of every slot, None unless ``need_t``), in x's dtype."""
    ys: list[Tensor] = []
    ts: list[Tensor] = []
    for part in parts:
        assert part.weight is not None and part.lora_B is not None
        y = linear(x, part.weight, part.bias if part.out_scale is None else None)
        if not ts:  # not before the first product, which has brought x into the cache
            ts = _down(x, slots, need_t, linear)
        onto(y, ts[part.slot], part.lora_B)
        if part.out_scale is not None:
            eager.scale_columns(y, part.out_scale, part.bias)
        ys.append(y)
    return ys, kept(ts, slots, need_t)


def _down(x: Tensor, slots: Sequence[Slot], need_t: Sequence[bool], linear: Linear) -> list[Tensor]:
    """t [M, r] of every slot: views of one product for those without dropout."""
    ts: dict[int, Tensor] = {}
    for index, slot in enumerate(slots):
        if slot.seed is not None:
            assert slot.lora_A is not None
            noise = stream_noise((x.shape[0], x.shape[1]), slot.seed, x.device)
            t = linear(drop(x, noise, slot.dropout_p), slot.lora_A, None)
            ts[index] = t.mul_(slot.scaling * keep_scale(slot.dropout_p))
    plain = together(slots, [True] * len(slots), need_t)
    if plain:
        own = [slots[index] for index in plain]
        t = linear(x, stacked(own), None)
        views = t.split_with_sizes([slot.rank for slot in own], 1)
        scaling = common_scaling(own)
        if scaling is not None:
            t.mul_(scaling)
        else:
            for view, slot in zip(views, own, strict=True):
                view.mul_(slot.scaling)
        ts |= zip(plain, views, strict=True)
    return [ts[index] for index in range(len(slots))]


def stacked(slots: Sequence[Slot]) -> Tensor:
    """Their lora_A as one [Σ r, K] matrix."""
    matrices = [slot.lora_A for slot in slots if slot.lora_A is not None]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def kept(
    ts: Sequence[Tensor], slots: Sequence[Slot], need_t: Sequence[bool]
) -> list[Tensor | None]:
    """Those of ``ts`` that are needed; copied if else they would hold memory of others."""
    if all(need_t):
        return list(ts)
    plain = {need_t[index] for index, slot in enumerate(slots) if slot.seed is None}
    return [
        None if not need else t.clone() if slot.seed is None and len(plain) == 2 else t
        for t, slot, need in zip(ts, slots, need_t, strict=True)
    ]


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    slots: Sequence[Slot],
    parts: Sequence[Part],
    ts: Sequence[Tensor | None],
    need_x: bool,
    need_A: Sequence[bool],
    needs: Sequence[Needs],
    *,
    linear: Linear = aten_linear,
    onto: Onto = aten_onto,
) -> tuple[Tensor | None, list[Tensor | None], list[Gradients]]:
    """(dx, dA of every slot, the rest of every part) for dys [M, N]; None where not asked for.

    Operands may be None where no gradient asked for needs them: x serves dA, dweight and
    dout_scale, t dC and dout_scale, weight and lora_A dx, C dx and dA; dout_scale takes all of a
    part's. dA, dC, dbias and dout_scale may come in float32.
    """
    want_h = [need_x or need for need in need_A]
    plain = together(slots, want_h, need_A)
    own_slots = [slots[index] for index in plain]
    ranks = [slot.rank for slot in own_slots]
    h = torch.empty((dys[0].shape[0], sum(ranks)), dtype=dys[0].dtype, device=dys[0].device)
    columns = dict(zip(plain, h.split_with_sizes(ranks, 1) if plain else (), strict=True))
    dx: Tensor | None = None
    dAs: list[Tensor | None] = [None] * len(slots)
    gradients: list[Gradients] = []
    begun: set[int] = set()
    for dy, part, need in zip(dys, parts, needs, strict=True):
        slot, t = slots[part.slot], ts[part.slot]
        own = dy
        if part.out_scale is not None and (want_h[part.slot] or need.weight or need.lora_B):
            own = eager.times(dy, part.out_scale)
        # dx first, as the base layer alone would: after it dy is in the cache
        if need_x:
            assert part.weight is not None
            if dx is None:
                dx = linear(own, part.weight.t(), None)
            else:
                onto(dx, own, part.weight.t())
        if want_h[part.slot]:
            assert part.lora_B is not None
            if slot.seed is None:
                fresh = part.slot not in begun
                begun.add(part.slot)
                onto(columns[part.slot], own, part.lora_B.t(), slot.scaling, fresh)
            else:
                dAs[part.slot] = _past_dropout(
                    own, x, slot, part.lora_B, dx, need_A[part.slot], linear
                )
        dC = None
        if need.lora_B:
            assert t is not None
            dC = eager.reduce(linear, t, own).t()
        gradients.append(_rest(dy, own, x, part, t, need, dC, linear))
    if need_x and plain:
        assert dx is not None
        onto(dx, h, stacked(own_slots).t())
    trained = [index for index in plain if need_A[index]]
    if trained:
        assert x is not None
        own_ranks = [slots[index].rank for index in trained]
        dA = eager.reduce(linear, h[:, : sum(own_ranks)], x)
        for index, rows in zip(trained, dA.split_with_sizes(own_ranks), strict=True):
            dAs[index] = rows
    return dx, dAs, gradients


def _past_dropout(
    dy: Tensor,
    x: Tensor | None,
    slot: Slot,
    lora_B: Tensor,
    dx: Tensor | None,
    need_A: bool,
    linear: Linear,
) -> Tensor | None:
    """dA of a slot that drops, if needed; its share of dx is added where there is a dx."""
    p = slot.dropout_p
    assert slot.seed is not None
    wide = slot.lora_A if x is None else x
    assert wide is not None
    h = linear(dy, lora_B.t(), None).mul_(slot.scaling * keep_scale(p))
    noise = stream_noise((dy.shape[0], wide.shape[1]), slot.seed, dy.device)
    dA = None
    if need_A:
        assert x is not None
        dA = eager.reduce(linear, h, drop(x, noise, p))
    if dx is not None:
        assert slot.lora_A is not None
        dx.add_(drop(linear(h, slot.lora_A.t(), None), noise, p))
    return dA


def _rest(
    dy: Tensor,
    own: Tensor,
    x: Tensor | None,
    part: Part,
    t: Tensor | None,
    need: Needs,
    dC: Tensor | None,
    linear: Linear,
) -> Gradients:
    """dC and what else one part is asked for; own is dy ∘ g."""
    dweight = dbias = dg = None
    if need.weight:
        assert x is not None
        dweight = linear(own.t(), x.t(), None)
    if need.bias:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    if need.out_scale:
        assert part.out_scale is not None and part.weight is not None
        assert x is not None and part.lora_B is not None and t is not None
        dg = eager.out_scale_gradient(
            dy, part.y, part.out_scale, part.bias, x, part.weight, part.lora_B, t, linear
        )
    return Gradients(dweight, dC, dbias, dg)
