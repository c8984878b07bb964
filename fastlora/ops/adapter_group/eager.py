"""The best PyTorch-only form: x is read once for all lora_A, dx is one accumulator.

As in ``adapter_linear``'s eager.py, ``linear``, ``update``, ``output_pass``, ``draw``, ``output``
and ``gradient`` can be others'.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from fastlora.ops.adapter_linear.eager import (
    Gather,
    Gradient,
    InPlace,
    Linear,
    Output,
    OutputPass,
    Passed,
    Update,
    add_output,
    add_product,
    add_scaled,
    aten_linear,
    read_output,
)
from fastlora.ops.dropout import Draw, keep_scale, stream_mask

draw_seed = eager.draw_seed


def forward(
    x: Tensor,
    slots: Sequence[Slot],
    parts: Sequence[Part],
    need_t: Sequence[bool],
    *,
    linear: Linear = aten_linear,
    update: Update = add_product,
    output: Output = add_output,
    draw: Draw = stream_mask,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(y [M, N] of every part, t [M, r] of every slot, None unless ``need_t``), in x's dtype."""
    ys: list[Tensor] = []
    ts = _down(x, slots, need_t, linear, draw)
    for part in parts:
        assert part.weight is not None and part.lora_B is not None
        own = (part.weight, ts[part.slot], part.lora_B, part.out_scale, part.bias)
        ys.append(output(x, *own, linear, update))
    return ys, kept(ts, slots, need_t)


def _down(
    x: Tensor, slots: Sequence[Slot], need_t: Sequence[bool], linear: Linear, draw: Draw
) -> list[Tensor]:
    """t [M, r] of every slot: views of one product for those without dropout."""
    ts: dict[int, Tensor] = {}
    for index, slot in enumerate(slots):
        if slot.seed is not None:
            assert slot.lora_A is not None
            mask = draw((x.shape[0], x.shape[1]), slot.dropout_p, slot.seed, x.device)
            t = linear(mask(x), slot.lora_A, None)
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
    update: Update = add_product,
    output_pass: OutputPass = read_output,
    gradient: Gather = InPlace,
    draw: Draw = stream_mask,
) -> tuple[Tensor | None, list[Tensor | None], list[Gradients]]:
    """(dx, dA of every slot, the rest of every part) for dys [M, N]; None where not asked for.

    Operands may be None where no gradient asked for needs them: x serves dA, dweight and
    dout_scale, t dC and dout_scale, weight and lora_A dx, C dx and dA; dout_scale takes all of a
    part's. dA, dC, dbias and dout_scale may come in float32.
    """
    want_h = [need_x or need for need in need_A]
    hs: dict[int, Tensor] = {}
    dx = gradient(linear, update)
    dAs: list[Tensor | None] = [None] * len(slots)
    gradients: list[Gradients] = []
    for dy, part, need in zip(dys, parts, needs, strict=True):
        number, slot = part.slot, slots[part.slot]
        wanted = want_h[number]
        passed = _read(
            dy, x, part, ts[number], need, need_x, need_A[number], linear, output_pass, dx
        )
        if passed.h is not None:
            hs[number] = hs[number].add_(passed.h) if number in hs else passed.h
        gradients.append(_of_part(dy, passed, x, need, linear))
        if need_x:  # after the narrow products, which stream dy into the cache
            assert part.weight is not None
            add_scaled(dx, dy, passed, part.weight, part.out_scale)
        if wanted and slot.seed is not None:
            own = dx if need_x else None
            dAs[number] = _past_dropout(hs[number], x, slot, own, need_A[number], linear, draw)
    plain = together(slots, want_h, need_A)
    if plain:
        h = _beside(hs, slots, plain)
        if need_x:
            dx.update(h, stacked([slots[index] for index in plain]))
        trained = [index for index in plain if need_A[index]]
        if trained:
            assert x is not None
            ranks = [slots[index].rank for index in trained]
            dA = eager.reduce(linear, h[:, : sum(ranks)], x)
            for index, rows in zip(trained, dA.split_with_sizes(ranks), strict=True):
                dAs[index] = rows
    return dx.total() if need_x else None, dAs, gradients


def _beside(hs: dict[int, Tensor], slots: Sequence[Slot], which: Sequence[int]) -> Tensor:
    """Their scaling · dY C as one [M, Σ r]."""
    scaling = common_scaling([slots[index] for index in which])
    if scaling is None:
        for index in which:
            hs[index].mul_(slots[index].scaling)
        scaling = 1.0
    matrices = [hs[index] for index in which]
    h = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
    return h if scaling == 1.0 else h.mul_(scaling)


def _past_dropout(
    h: Tensor,
    x: Tensor | None,
    slot: Slot,
    dx: Gradient | None,
    need_A: bool,
    linear: Linear,
    draw: Draw,
) -> Tensor | None:
    """dA of a slot that drops, if needed; its share of dx is added where there is a dx."""
    p = slot.dropout_p
    wide = slot.lora_A if x is None else x
    assert slot.seed is not None and wide is not None
    h.mul_(slot.scaling * keep_scale(p))
    mask = draw((h.shape[0], wide.shape[1]), p, slot.seed, h.device)
    dA = None
    if need_A:
        assert x is not None
        dA = eager.reduce(linear, h, mask(x))
    if dx is not None:
        assert slot.lora_A is not None
        dx.update(h, slot.lora_A, mask)
    return dA


def _read(
    dy: Tensor,
    x: Tensor | None,
    part: Part,
    t: Tensor | None,
    need: Needs,
    need_x: bool,
    need_A: bool,
    linear: Linear,
    output_pass: OutputPass,
    gradient: Gradient,
) -> Passed:
    """What one part's dY gives; its scaling comes later, for all parts at once."""
    if part.out_scale is None:
        lora_B = part.lora_B if need_x or need_A else None
        return output_pass(dy, lora_B, t if need.lora_B else None, 1.0, linear)
    return eager.scaled_pass(
        dy, part.y, part.out_scale, part.bias, x, part.weight, part.lora_B, t, 1.0,
        need_x, need.weight, need_A, need.lora_B, need.out_scale, linear, output_pass, gradient,
    )  # fmt: skip


def _of_part(
    dy: Tensor, passed: Passed, x: Tensor | None, need: Needs, linear: Linear
) -> Gradients:
    """The gradients of one part but dA."""
    dweight = dbias = None
    if need.weight:
        assert x is not None
        dweight = linear(passed.dy.t(), x.t(), None)
    if need.bias:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return Gradients(dweight, passed.dC, dbias, passed.dg)
