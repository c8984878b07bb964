"""The update with ``torch._foreach``, on any device: a handful of calls for the whole list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.sign_momentum.contract import Job, Momentum, Number, compute_dtype, keys
from fastlora.ops.sign_momentum.eight_bit import EightBit, double


def read(job: Job, kept: Any = None, checked: bool = False) -> None:
    """Nothing: op.py's checks are needed."""


@torch.no_grad()
def update(job: Job, table: Any = None) -> Tensor | None:
    """Everything the job asks for, in place; with shrink, which gradients were not finite."""
    momenta, params, grads = job.momenta, job.params, job.grads
    if not momenta:
        return torch.zeros(0, dtype=torch.bool, device="cpu") if job.shrink is not None else None
    wide = [compute_dtype(None if params is None else params[i]) for i in range(len(momenta))]
    lost = None
    if job.shrink is not None and grads is not None:
        lost = torch.stack([~g.isfinite().all() for g in grads])
    masks = [_mask(job, i) for i in range(len(momenta))]
    # tensors that are computed in place, and copies of those that are not what is computed in
    apart = [mask is not None or lost is not None for mask in masks]
    m = [_work(*each) for each in zip(momenta, wide, apart, strict=True)]
    if grads is None:
        u = list(torch._foreach_sign(m))
    else:
        g = [grad.to(dtype) for grad, dtype in zip(grads, wide, strict=True)]
        u = _momentum(job, m, g)
        _store_momenta(job, m, masks, lost)
    if params is None:
        return lost
    theta = [
        _work(param, dtype, kept or job.skip is not None)
        for param, dtype, kept in zip(params, wide, apart, strict=True)
    ]
    if job.moves:
        eta, w = _scales(job, theta)
        _times_(theta, w)
        _times_(u, eta)
        torch._foreach_sub_(theta, u)
    _store_params(job, theta, masks, lost)
    return lost


def _momentum(job: Job, m: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    """m becomes c·m + d·g; returns sign(a·m + b·g), where parameters move."""
    u: list[Tensor] = []
    added = torch._foreach_mul(g, job.d)
    same = job.a == job.c and job.b == job.d
    if job.moves and not same:
        u = list(torch._foreach_mul(m, job.a))
        torch._foreach_add_(u, torch._foreach_mul(g, job.b))
        torch._foreach_sign_(u)
    torch._foreach_mul_(m, job.c)
    torch._foreach_add_(m, added)
    return list(torch._foreach_sign(m)) if job.moves and same else u


def _store_momenta(
    job: Job, m: list[Tensor], masks: list[Tensor | None], lost: Tensor | None
) -> None:
    for i, momentum in enumerate(job.momenta):
        if m[i] is momentum:
            continue
        new = m[i]
        old = momentum.to_float() if isinstance(momentum, EightBit) else momentum
        mask = masks[i]
        if mask is not None and job.mask_momentum:
            new = torch.where(mask, new, old)
        if isinstance(momentum, EightBit):
            fresh = EightBit.from_float(new)
            codes, scales = fresh.codes, fresh.scales
            if lost is not None:
                codes = torch.where(lost[i], momentum.codes, codes)
                scales = torch.where(lost[i], momentum.scales, scales)
            momentum.codes.copy_(codes)
            momentum.scales.copy_(scales)
            continue
        momentum.copy_(new if lost is None else torch.where(lost[i], old, new))


def _store_params(
    job: Job, theta: list[Tensor], masks: list[Tensor | None], lost: Tensor | None
) -> None:
    assert job.params is not None
    for i, param in enumerate(job.params):
        if theta[i] is param:
            continue
        new = theta[i]
        if job.skip is not None:
            new = torch.where(job.skip[i], param.to(new.dtype), new)
        if lost is not None and job.shrink is not None and job.centers is not None:
            c = job.centers[i]
            old = param.to(new.dtype)
            new = torch.where(lost[i], (old - c) * job.shrink + c, new if job.moves else old)
        mask = masks[i]
        if mask is not None:
            new = torch.where(mask, new, param.to(new.dtype))
        if job.seed is not None and param.dtype == torch.bfloat16:
            new = round_stochastically(new, job.seed, i)
        param.copy_(new)


def _work(tensor: Momentum, dtype: torch.dtype, apart: bool) -> Tensor:
    """The tensor itself where it may be computed in, else a copy that may."""
    if isinstance(tensor, EightBit):
        return tensor.to_float().to(dtype)
    return tensor.detach().to(dtype, copy=True) if apart or tensor.dtype != dtype else tensor


def _mask(job: Job, i: int) -> Tensor | None:
    """What moves of tensor i, to be broadcast over its last axis; None: all of it."""
    mask = None if job.rows is None else job.rows[i]
    if mask is None:
        return None
    shape = job.momenta[i].shape
    return mask.view(shape[:-1]).unsqueeze(-1) if len(shape) else mask.view(shape)


def _scales(job: Job, theta: list[Tensor]) -> tuple[Any, Any]:
    """(η, w): one number for all, or one number or tensor for each."""
    kinds = job.relative or [None] * len(theta)
    if not any(kinds) and not any(
        isinstance(x, Tensor) for values in (job.lr, job.weight_decay) for x in values
    ):
        etas = [float(lr) for lr in job.lr]
        ws = [1 - lr * float(decay) for lr, decay in zip(etas, job.weight_decay, strict=True)]
        return _one(etas), _one(ws)
    pairs = [
        _scale(job.lr[i], job.weight_decay[i], job.floor[i], kinds[i], tensor)
        for i, tensor in enumerate(theta)
    ]
    return [eta for eta, _ in pairs], [w for _, w in pairs]


def _one(values: list[float]) -> float | list[float]:
    return values[0] if all(value == values[0] for value in values) else values


def _scale(
    lr: Number, decay: Number, floor: Number, kind: str | None, theta: Tensor
) -> tuple[Tensor, Tensor]:
    wide = double(theta.device)
    eta = torch.as_tensor(lr, dtype=wide, device=theta.device)
    if kind is not None:
        squares = theta.to(wide).square()
        by_row = kind == "rows" and theta.dim() > 0
        mean = squares.mean(-1, keepdim=True) if by_row else squares.mean()
        rms = mean.sqrt().to(theta.dtype).to(wide)
        eta = eta * rms.maximum(torch.as_tensor(floor, dtype=wide, device=theta.device))
    w = 1 - eta * torch.as_tensor(decay, dtype=wide, device=theta.device)
    return eta.to(theta.dtype), w.to(theta.dtype)


def _times_(tensors: list[Tensor], factors: float | Sequence[Any]) -> None:
    if isinstance(factors, float) and factors == 1.0:
        return
    torch._foreach_mul_(tensors, factors)


def round_stochastically(values: Tensor, seed: int, index: int) -> Tensor:
    """bfloat16 from float32 with the random bits of ``contract.keys``; NaN and ±∞ as they are."""
    full = 0xFFFFFFFF
    flat = values.contiguous().view(torch.int32).view(-1)
    k0, k1 = keys(seed, index)
    h = torch.arange(flat.numel(), device=flat.device).add_(k0).bitwise_and_(full)
    h ^= h >> 16
    h.mul_(0x85EBCA6B).bitwise_and_(full)
    h ^= h >> 13
    h ^= k1
    h.mul_(0xC2B2AE35).bitwise_and_(full)
    h ^= h >> 16
    h.bitwise_and_(0xFFFF).add_(flat)  # a carry out of the low half rounds away from zero
    rounded = h.bitwise_and_(~0xFFFF).to(torch.int32).view(torch.float32).view(values.shape)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
