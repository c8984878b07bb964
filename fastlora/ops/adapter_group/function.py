"""The autograd Function of ``adapter_group``: what is kept, and whose gradient is whose."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora.ops.adapter_group.contract import Gradients, Member, Needs, Part, Slot
from fastlora.ops.adapter_group.shares import share
from fastlora.ops.adapter_linear.contract import Scales, check_mask, rows
from fastlora.ops.adapter_linear.scaled import (
    ScaledNeeds,
    Watch,
    fold,
    unfold,
    watched,
    what_to_keep,
)
from fastlora.ops.dropout import threshold
from fastlora.ops.dtypes import to


def tensors(member: Member) -> tuple[Tensor | None, ...]:
    """A member's, in the order of ``ScaledNeeds`` after x."""
    weight, lora_A, lora_B, _, bias, _, out_scale, mid_scale, adapter_scale, *_ = member
    return weight, lora_A, lora_B, bias, out_scale, mid_scale, adapter_scale


class _Own(NamedTuple):
    """What backward must know of one member beside tensors."""

    needs: ScaledNeeds
    slot: int
    factor: float  # what of its scaling goes into C
    dtypes: list[torch.dtype | None]  # as ``tensors``
    seed_dim: int | None
    watch: Watch | None  # of its output, where it is kept


class _Kept(NamedTuple):
    """What backward reads of one member; None where no gradient asked for needs it."""

    weight: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    out_scale: Tensor | None
    mid_scale: Tensor | None
    adapter_scale: Tensor | None
    y: Tensor | None
    seed: Tensor | None


class AdapterGroup(torch.autograd.Function):
    """Takes x, the members, a backend's module, and the members' tensors once more.

    The last, those of ``tensors`` that there are, are arguments so that autograd knows of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, members: tuple[Member, ...], module: ModuleType, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        need_x, _, _, *flags = ctx.needs_input_grad
        flag = iter(flags)
        needs, keeps, seeds = [], [], []
        for member in members:
            asked = (tensor is not None and next(flag) for tensor in tensors(member))
            needs.append(ScaledNeeds(need_x, *asked))
            keeps.append(what_to_keep(needs[-1], drop_base=False, keep_output=member.keep_output))
            p = member.dropout_p
            seed = module.draw_seed(x.device) if p > 0.0 else None
            seeds.append(seed if threshold(p) > 0 else None)
        trained = [need.lora_A for need in needs]
        slots, slot_of, factors = share(members, trained, seeds, x.dtype)
        need_t = [False] * len(slots)
        parts = []
        for member, keep, slot, factor in zip(members, keeps, slot_of, factors, strict=True):
            need_t[slot] |= "t" in keep
            lora_B = _fold(member.lora_B, _scales(member), factor, x.dtype)
            parts.append(Part(slot, member.weight, lora_B, member.bias, member.out_scale))
        ys, ts = module.forward(rows(x), slots, parts, need_t)
        if x.dim() != 2:
            # not views: autograd has its own rules for those, and a y may be saved besides
            view = torch.ops.aten._unsafe_view
            ys = [view(y, (*x.shape[:-1], y.shape[1])) for y in ys]
        saved = [x if any("x" in keep for keep in keeps) else None, *ts]
        own = []
        for index, (member, keep, seed) in enumerate(zip(members, keeps, seeds, strict=True)):
            need = needs[index]
            y, watch = watched(ys[index]) if "read" in keep else (None, None)
            saved += (
                member.weight if "weight" in keep else None,
                member.lora_A if "lora_A" in keep else None,
                member.lora_B if "lora_B" in keep else None,
                member.bias if "bias" in keep else None,
                *(_scales(member) if "scales" in keep else (None, None, None)),
                y,
                seed if any(need) else None,
            )
            dtypes = [None if tensor is None else tensor.dtype for tensor in tensors(member)]
            dim = None if seed is None else seed.dim()
            own.append(_Own(need, slot_of[index], factors[index], dtypes, dim, watch))
        ctx.save_for_backward(*saved)
        # a layer of which nothing trains would give such a y by itself
        ctx.mark_non_differentiable(
            *[y for y, need in zip(ys, needs, strict=True) if not any(need)]
        )
        bare = [slot._replace(lora_A=None, seed=None) for slot in slots]
        ctx.static = (x.shape, module, need_x, bare, own)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, module, need_x, bare, members = ctx.static
        x, *saved = ctx.saved_tensors
        ts, saved = saved[: len(bare)], saved[len(bare) :]
        size = len(_Kept._fields)
        kept = {}
        flat = []
        first_user: dict[int, int] = {}  # of each slot, among members whose output was used
        for index, dy in enumerate(dys):
            if dy is not None:
                own = members[index]
                kept[index] = _Kept(*saved[index * size : (index + 1) * size])
                check_mask(kept[index].seed, own.seed_dim)
                if own.watch is not None and own.watch.has_seen_a_change():
                    kept[index] = kept[index]._replace(y=None, bias=None)  # as without keep_output
                first_user.setdefault(own.slot, index)
                flat.append(rows(dy))
        gradients: dict[int, tuple[Tensor | None, ...]] = {}
        dx = None
        if flat:
            dtype = flat[0].dtype
            place = {slot: number for number, slot in enumerate(first_user)}
            dx, dAs, rest = module.backward(
                flat,
                None if x is None else rows(x),
                [_slot(bare[slot], kept[user], dtype) for slot, user in first_user.items()],
                [_part(place[members[i].slot], kept[i], members[i], dtype) for i in kept],
                [ts[slot] for slot in first_user],
                need_x,
                [members[user].needs.lora_A for user in first_user.values()],
                [_needs(members[i].needs) for i in kept],
            )
            for index, given in zip(kept, rest, strict=True):
                gradients[index] = _gradients(members[index], kept[index], given)
            for user, dA in zip(first_user.values(), dAs, strict=True):
                # of a lora_A that several members share, the first brings what all contribute
                dweight, _, *others = gradients[user]
                gradients[user] = (dweight, dA, *others)
            dx = None if dx is None else dx.view(shape)
        results: list[Tensor | None] = [dx, None, None]
        for index, own in enumerate(members):
            given = gradients.get(index, (None,) * len(own.dtypes))
            for gradient, dtype in zip(given, own.dtypes, strict=True):
                if dtype is not None:  # there is such an operand
                    results.append(None if gradient is None else to(gradient, dtype))
        return tuple(results)


def _scales(own: Member | _Kept) -> Scales:
    return Scales(own.out_scale, own.mid_scale, own.adapter_scale)


def _fold(lora_B: Tensor, scales: Scales, factor: float, dtype: torch.dtype) -> Tensor:
    """C = factor · diag(b) B diag(d) [N, r] in ``dtype``, rounded once."""
    if factor == 1.0 and scales.mid is None and scales.adapter is None:
        return to(lora_B, dtype)
    if factor != 1.0:
        lora_B = lora_B.to(torch.promote_types(dtype, torch.float32)) * factor
    return fold(lora_B, scales, dtype)


def _slot(bare: Slot, kept: _Kept, dtype: torch.dtype) -> Slot:
    lora_A = None if kept.lora_A is None else to(kept.lora_A, dtype)
    return bare._replace(lora_A=lora_A, seed=kept.seed)


def _part(slot: int, kept: _Kept, own: _Own, dtype: torch.dtype) -> Part:
    lora_B = kept.lora_B
    if lora_B is not None:
        lora_B = _fold(lora_B, _scales(kept), own.factor, dtype)
    y = None if kept.y is None else rows(kept.y)
    return Part(slot, kept.weight, lora_B, kept.bias, kept.out_scale, y)


def _needs(needs: ScaledNeeds) -> Needs:
    """What that asks of a backend, in which lora_B is C."""
    folded = needs.lora_B or needs.mid_scale or needs.adapter_scale
    return Needs(needs.weight, folded, needs.bias, needs.out_scale)


def _gradients(own: _Own, kept: _Kept, given: Gradients) -> tuple[Tensor | None, ...]:
    """Those of one member in the order of ``tensors``, without dA."""
    needs, dC = own.needs, given.lora_B
    if dC is not None and own.factor != 1.0:
        dC = dC * own.factor
    dB, dd, db = unfold(
        dC, kept.lora_B, _scales(kept), needs.lora_B, needs.mid_scale, needs.adapter_scale
    )
    return given.weight, None, dB, given.bias, given.out_scale, dd, db
