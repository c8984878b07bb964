"""``adapter_group``: linear layers with low-rank adapters that read one x, as one function."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora.ops import backend as _backend
from fastlora.ops.adapter_group.contract import BACKENDS, Member, Needs, Part, Slot
from fastlora.ops.adapter_group.shares import share
from fastlora.ops.adapter_linear.contract import Scales, check_mask, rows
from fastlora.ops.adapter_linear.entry import (
    AUTOCAST,
    autocasts,
    cast,
    check,
    check_vectors,
    is_transformed,
)
from fastlora.ops.adapter_linear.op import adapter_linear
from fastlora.ops.adapter_linear.scaled import ScaledNeeds, fold, unfold, what_to_keep
from fastlora.ops.dropout import threshold

_TENSORS = ("weight", "lora_A", "lora_B", "bias", "out_scale", "mid_scale", "adapter_scale")
_KEPT_AS = ("weight", "lora_A", "lora_B", "bias", "scales", "scales", "scales")  # in what_to_keep


def adapter_group(
    x: Tensor, members: Sequence[Member], *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """Several ``adapter_linear`` layers that read the same x (q, k, v; gate, up) in one call.

    Result i and every gradient are those of ``adapter_linear`` with x and member i; x is read once
    for all products with lora_A, it is kept once, and its gradient is summed in one accumulator.

    Args:
        x: input [..., K]; any leading dimensions, any strides, any number of tokens (0 too).
        members: one or more. They may differ in everything but K. Members without dropout whose
            lora_A is the very same tensor (VeRA: the same memory, if it is frozen) share its
            products with x. With dropout every member draws a mask of its own, in this order.
        backend: 'triton', 'onednn' or 'eager'; None chooses (see ``fastlora.explain``).

    Only what the gradients asked for need is kept, by the rules of ``adapter_linear``. An output
    that is not used costs nothing in backward and leaves its member without gradients, as a layer
    that is not used would be. No second derivative.

    The members run one by one through ``adapter_linear``, with the same results, under
    torch.compile, torch.func's transforms, forward-mode derivatives and torch.jit.trace, for nested
    and meta tensors, and where a member's ``drop_base`` acts (that is, under dropout).

    Returns:
        y_i [..., N_i] of every member, in the compute dtype.

    Raises:
        ValueError: no member; or what ``adapter_linear`` refuses, the sentence naming the member.
        TypeError: likewise.
        BackendError: the backend asked for cannot run this call.
    """
    if len(members) == 0:
        raise ValueError("adapter_group needs at least one member")
    device = x.device
    autocast = autocasts(x)
    if autocast and x.dtype in AUTOCAST:
        dtype = torch.get_autocast_dtype(device.type)
        x = x.to(dtype)
        members = [_cast(member, dtype) for member in members]
    one_by_one = torch.compiler.is_compiling() or is_transformed(x)
    for index, member in enumerate(members):
        try:
            one_by_one = _check(x, member) or one_by_one
        except (TypeError, ValueError) as error:
            raise type(error)(f"member {index}: {error}") from None
    if one_by_one:
        return tuple(_alone(x, member, backend) for member in members)
    module = _backend.select("adapter_group", BACKENDS, device, x.dtype, backend)
    plan = _Plan(
        tuple(float(member.scaling) for member in members),
        tuple(member.dropout_p for member in members),
        tuple(member.keep_output for member in members),
        module,
    )
    tensors = [getattr(member, name) for member in members for name in _TENSORS]
    with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
        return _AdapterGroup.apply(x, plan, *tensors)


def _cast(member: Member, dtype: torch.dtype) -> Member:
    bias = None if member.bias is None else cast(member.bias, dtype)
    return member._replace(weight=cast(member.weight, dtype), bias=bias)


def _check(x: Tensor, member: Member) -> bool:
    """Refuses what ``adapter_linear`` refuses; whether the member's ``drop_base`` acts."""
    weight, lora_A, lora_B, scaling, bias, dropout_p, *vectors, drop_base, _ = member
    check(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    _, drop_base = check_vectors(Scales(*vectors), x, lora_B, dropout_p, drop_base)
    return drop_base


def _alone(x: Tensor, member: Member, backend: str | None) -> Tensor:
    weight, lora_A, lora_B, scaling, bias, dropout_p, out, mid, adapter, *switches = member
    drop_base, keep_output = switches
    return adapter_linear(
        x,
        weight,
        lora_A,
        lora_B,
        scaling,
        bias,
        dropout_p,
        out_scale=out,
        mid_scale=mid,
        adapter_scale=adapter,
        drop_base=drop_base,
        keep_output=keep_output,
        backend=backend,
    )


class _Plan(NamedTuple):
    """What of a call is no tensor."""

    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    keep_outputs: tuple[bool, ...]
    module: ModuleType


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

    @property
    def scales(self) -> Scales:
        return Scales(self.out_scale, self.mid_scale, self.adapter_scale)


class _AdapterGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        size = len(_TENSORS)
        firsts = range(0, len(tensors), size)
        need_x, flags = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        needs = [ScaledNeeds(need_x, *flags[first : first + size]) for first in firsts]
        keep = [
            what_to_keep(need, drop_base=False, keep_output=keep_output)
            for need, keep_output in zip(needs, plan.keep_outputs, strict=True)
        ]
        seeds = []
        for p in plan.dropouts:
            seed = plan.module.draw_seed(x.device) if p > 0.0 else None
            seeds.append(seed if threshold(p) > 0 else None)
        slots, slot_of, factors = share(
            [tensors[first + 1] for first in firsts],
            x.dtype,
            [need.lora_A for need in needs],
            plan.scalings,
            plan.dropouts,
            seeds,
        )
        need_t = [False] * len(slots)
        parts = []
        for first, own, slot, factor in zip(firsts, keep, slot_of, factors, strict=True):
            weight, _, lora_B, bias, *vectors = tensors[first : first + size]
            lora_B = _fold(lora_B, Scales(*vectors), factor, x.dtype)
            parts.append(Part(slot, weight, lora_B, bias, vectors[0]))
            need_t[slot] |= "t" in own
        ys, ts = plan.module.forward(rows(x), slots, parts, need_t)
        if x.dim() != 2:
            # not views: autograd has its own rules for those, and a y may be saved besides
            view = torch.ops.aten._unsafe_view
            ys = [view(y, (*x.shape[:-1], y.shape[1])) for y in ys]
        saved = [x if any("x" in own for own in keep) else None, *ts]
        for first, own, need, y, seed in zip(firsts, keep, needs, ys, seeds, strict=True):
            for tensor, name in zip(tensors[first : first + size], _KEPT_AS, strict=True):
                saved.append(tensor if name in own else None)
            saved += [y if "read" in own else None, seed if any(need) else None]
        ctx.save_for_backward(*saved)
        # a layer of which nothing trains would give such a y by itself
        ctx.mark_non_differentiable(
            *[y for y, need in zip(ys, needs, strict=True) if not any(need)]
        )
        bare = [slot._replace(lora_A=None, seed=None) for slot in slots]
        ctx.static = (x.shape, plan.module, needs, bare, slot_of, factors)
        ctx.seed_dims = [None if seed is None else seed.dim() for seed in seeds]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, module, needs, bare, slot_of, factors = ctx.static
        x, *saved = ctx.saved_tensors
        saved_ts, saved = saved[: len(bare)], saved[len(bare) :]
        need_x = needs[0].x
        # only the outputs that were used, and the slots of these: forward's number to ours
        flat: list[Tensor] = []
        live: list[tuple[int, _Kept]] = []
        place: dict[int, int] = {}
        slots: list[Slot] = []
        parts: list[Part] = []
        asked: list[Needs] = []
        ts: list[Tensor | None] = []
        need_A: list[bool] = []
        for index, dy in enumerate(dys):
            if dy is None:
                continue
            kept = _Kept(*saved[index * len(_Kept._fields) : (index + 1) * len(_Kept._fields)])
            check_mask(kept.seed, ctx.seed_dims[index])
            need, own = needs[index], slot_of[index]
            if own not in place:
                place[own] = len(slots)
                lora_A = None if kept.lora_A is None else kept.lora_A.to(dy.dtype)
                slots.append(bare[own]._replace(lora_A=lora_A, seed=kept.seed))
                ts.append(saved_ts[own])
                need_A.append(need.lora_A)
            lora_B, y = kept.lora_B, kept.y
            if lora_B is not None:
                lora_B = _fold(lora_B, kept.scales, factors[index], dy.dtype)
            y = None if y is None else rows(y)
            parts.append(Part(place[own], kept.weight, lora_B, kept.bias, kept.out_scale, y))
            folded = need.of_backend().lora_B
            asked.append(Needs(need.weight, folded, need.bias, need.out_scale))
            flat.append(rows(dy))
            live.append((index, kept))
        gradients: list[Tensor | None] = [None] * len(ctx.dtypes)
        if not live:
            return (None, None, *gradients)
        dx, dAs, rest = module.backward(
            flat, None if x is None else rows(x), slots, parts, ts, need_x, need_A, asked
        )
        for (index, kept), part, (dweight, dC, dbias, dg) in zip(live, parts, rest, strict=True):
            need, factor = needs[index], factors[index]
            dC = dC * factor if dC is not None and factor != 1.0 else dC
            dB, dd, db = unfold(
                dC, kept.lora_B, kept.scales, need.lora_B, need.mid_scale, need.adapter_scale
            )
            dA, dAs[part.slot] = dAs[part.slot], None  # of a shared one the first brings all
            first = index * len(_TENSORS)
            for number, gradient in enumerate((dweight, dA, dB, dbias, dg, dd, db), first):
                if gradient is not None:
                    gradients[number] = gradient.to(ctx.dtypes[number])
        return (None if dx is None else dx.view(shape), None, *gradients)


def _fold(lora_B: Tensor, scales: Scales, factor: float, dtype: torch.dtype) -> Tensor:
    """C = factor · diag(b) B diag(d) [N, r] in ``dtype``, rounded once."""
    if factor != 1.0:
        lora_B = lora_B.to(torch.promote_types(dtype, torch.float32)) * factor
    return fold(lora_B, scales, dtype)
