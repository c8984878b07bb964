"""The autograd Function of ``adapter_group``: what is kept, and whose gradient is whose."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
from fastlora.ops.once import once_differentiable

_unsafe_view = torch.ops.aten._unsafe_view.default


def tensors(member: Member) -> tuple[Tensor | None, ...]:
    """A member's, in the order of ``ScaledNeeds`` after x."""
    weight, lora_A, lora_B, _, bias, _, out_scale, mid_scale, adapter_scale, *_ = member
    return weight, lora_A, lora_B, bias, out_scale, mid_scale, adapter_scale


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


# by field of _Kept, what ``what_to_keep`` calls it
_NAMES = ("weight", "lora_A", "lora_B", "bias", "scales", "scales", "scales", "read", "seed")


class _Plan(NamedTuple):
    """What follows for one member from which operands it has and which gradients are asked for."""

    needs: ScaledNeeds
    keep: frozenset[str]
    saved: tuple[int, ...]  # fields of _Kept
    given: tuple[int, ...]  # operands there are, as ``tensors`` has them
    asked: Needs  # of a backend, for which lora_B is C


class _Form(NamedTuple):
    """Which of a member's operands there are besides its matrices, and how it is computed."""

    bias: bool
    out_scale: bool
    mid_scale: bool
    adapter_scale: bool
    seed: bool
    keep_output: bool


@functools.lru_cache(maxsize=1024)
def _plans(need_x: bool, flags: tuple[bool, ...], forms: tuple[_Form, ...]) -> tuple[_Plan, ...]:
    """A plan for every member; ``flags``: whether each operand's gradient is asked for."""
    flag = iter(flags)
    plans = []
    for form in forms:
        there = (True, True, True, *form[:4])
        needs = ScaledNeeds(need_x, *(has and next(flag) for has in there))
        keep = what_to_keep(needs, drop_base=False, keep_output=form.keep_output)
        has = (*there, True, form.seed and any(needs))
        saved = tuple(i for i, name in enumerate(_NAMES) if name in keep and has[i])
        given = tuple(i for i, has in enumerate(there) if has)
        folded = needs.lora_B or needs.mid_scale or needs.adapter_scale
        asked = Needs(needs.weight, folded, needs.bias, needs.out_scale)
        plans.append(_Plan(needs, frozenset(keep), saved, given, asked))
    return tuple(plans)


class _Own(NamedTuple):
    """What backward must know of one member beside its plan and tensors."""

    slot: int
    factor: float  # what of its scaling goes into C
    seed_dim: int | None
    watch: Watch | None  # of its output, where it is kept


class AdapterGroup(torch.autograd.Function):
    """Takes x, the members, a backend's module, and the members' tensors once more.

    The last, those of ``tensors`` that there are, are arguments so that autograd knows of them.
    ``passed`` of a node: whether backward has gone through it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, members: tuple[Member, ...], module: ModuleType, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.passed = False
        dtype, device = x.dtype, x.device
        seeds: list[Tensor | None] = []
        forms = []
        for member in members:
            _, _, _, _, bias, p, g, d, b, _, keep_output = member
            seed = module.draw_seed(device) if p > 0.0 else None
            seeds.append(seed if threshold(p) > 0 else None)
            has = bias is not None, g is not None, d is not None, b is not None
            forms.append(_Form(*has, seeds[-1] is not None, keep_output))
        need_x, _, _, *flags = ctx.needs_input_grad
        plans = _plans(need_x, tuple(flags), tuple(forms))
        trained = [plan.needs.lora_A for plan in plans]
        slots, slot_of, factors = share(members, trained, seeds, dtype)
        need_t = [False] * len(slots)
        parts = []
        for member, plan, slot, factor in zip(members, plans, slot_of, factors, strict=True):
            need_t[slot] |= "t" in plan.keep
            lora_B = _fold(member.lora_B, member, factor, dtype)
            parts.append(Part(slot, member.weight, lora_B, member.bias, member.out_scale))
        ys, ts = module.forward(rows(x), slots, parts, need_t)
        if x.dim() != 2:
            # not views: autograd has its own rules for those, and a y may be saved besides
            leading = x.shape[:-1]
            ys = [_unsafe_view(y, (*leading, y.shape[1])) for y in ys]
        saved = [x if any("x" in plan.keep for plan in plans) else None, *ts]
        own = []
        for member, plan, y, slot, factor, seed in zip(
            members, plans, ys, slot_of, factors, seeds, strict=True
        ):
            y, watch = watched(y) if "read" in plan.keep else (None, None)
            there = (*tensors(member), y, seed)
            saved += [there[field] for field in plan.saved]
            own.append(_Own(slot, factor, None if seed is None else seed.dim(), watch))
        ctx.save_for_backward(*saved)
        # a layer of which nothing trains would give such a y by itself
        untrained = [y for y, plan in zip(ys, plans, strict=True) if not any(plan.needs)]
        if untrained:
            ctx.mark_non_differentiable(*untrained)
        bare = [(slot.rank, slot.scaling, slot.dropout_p) for slot in slots]
        dtypes = [operand.dtype for operand in operands]
        ctx.static = (x.shape, module, need_x, bare, plans, own, dtypes)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.passed = True
        shape, module, need_x, bare, plans, members, dtypes = ctx.static
        x, *saved = ctx.saved_tensors
        ts, at = saved, len(bare)
        kept: dict[int, _Kept] = {}
        flat = []
        first_user: dict[int, int] = {}  # of each slot, among members whose output was used
        for index, (dy, plan, own) in enumerate(zip(dys, plans, members, strict=True)):
            if dy is not None:
                fields: list[Tensor | None] = [None] * len(_NAMES)
                for place, field in enumerate(plan.saved, at):
                    fields[field] = saved[place]
                one = _Kept._make(fields)
                if one.seed is not None:
                    check_mask(one.seed, own.seed_dim)
                if own.watch is not None and own.watch.has_seen_a_change():
                    one = one._replace(y=None, bias=None)  # as without keep_output
                kept[index] = one
                first_user.setdefault(own.slot, index)
                flat.append(rows(dy))
            at += len(plan.saved)
        gradients: dict[int, tuple[Tensor | None, ...]] = {}
        dx = None
        if flat:
            dtype = flat[0].dtype
            place_of = {slot: number for number, slot in enumerate(first_user)}
            dx, dAs, rest = module.backward(
                flat,
                None if x is None else rows(x),
                [_slot(bare[slot], kept[user], dtype) for slot, user in first_user.items()],
                [_part(place_of[members[i].slot], kept[i], members[i], dtype) for i in kept],
                [ts[slot] for slot in first_user],
                need_x,
                [plans[user].needs.lora_A for user in first_user.values()],
                [plans[i].asked for i in kept],
            )
            for index, given in zip(kept, rest, strict=True):
                factor = members[index].factor
                gradients[index] = _gradients(plans[index].needs, factor, kept[index], given)
            for user, dA in zip(first_user.values(), dAs, strict=True):
                # of a lora_A that several members share, the first brings what all contribute
                dweight, _, *others = gradients[user]
                gradients[user] = (dweight, dA, *others)
            dx = None if dx is None else dx.view(shape)
        results: list[Tensor | None] = [dx, None, None]
        for index, plan in enumerate(plans):
            found = gradients.get(index)
            results += [None if found is None else found[operand] for operand in plan.given]
        for place, dtype in enumerate(dtypes, 3):
            gradient = results[place]
            if gradient is not None:
                results[place] = to(gradient, dtype)
        return tuple(results)


def _fold(lora_B: Tensor, own: Member | _Kept, factor: float, dtype: torch.dtype) -> Tensor:
    """C = factor · diag(b) B diag(d) [N, r] in ``dtype``, rounded once."""
    if factor == 1.0 and own.mid_scale is None and own.adapter_scale is None:
        return to(lora_B, dtype)
    if factor != 1.0:
        lora_B = lora_B.to(torch.promote_types(dtype, torch.float32)) * factor
    return fold(lora_B, Scales(None, own.mid_scale, own.adapter_scale), dtype)


def _slot(bare: tuple[int, float, float], kept: _Kept, dtype: torch.dtype) -> Slot:
    lora_A = None if kept.lora_A is None else to(kept.lora_A, dtype)
    return Slot(lora_A, *bare, kept.seed)


def _part(slot: int, kept: _Kept, own: _Own, dtype: torch.dtype) -> Part:
    lora_B = kept.lora_B
    if lora_B is not None:
        lora_B = _fold(lora_B, kept, own.factor, dtype)
    y = None if kept.y is None else rows(kept.y)
    return Part(slot, kept.weight, lora_B, kept.bias, kept.out_scale, y)


def _gradients(
    needs: ScaledNeeds, factor: float, kept: _Kept, given: Gradients
) -> tuple[Tensor | None, ...]:
    """Those of one member in the order of ``tensors``, without dA."""
    dC = given.lora_B
    if dC is not None and factor != 1.0:
        dC = dC * factor
    scales = Scales(None, kept.mid_scale, kept.adapter_scale)
    dB, dd, db = unfold(dC, kept.lora_B, scales, needs.lora_B, needs.mid_scale, needs.adapter_scale)
    return given.weight, None, dB, given.bias, given.out_scale, dd, db
