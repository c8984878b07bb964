"""The formula, naively, one tensor after another: the specification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.ops.sign_momentum.contract import Job, compute_dtype, keys
from fastlora.ops.sign_momentum.eight_bit import EightBit


def read(job: Job, kept: Any = None, checked: bool = False) -> None:
    """Nothing, as in eager.py."""


@torch.no_grad()
def update(job: Job, table: Any = None) -> Tensor | None:
    """As in eager.py."""
    lost = []
    for i, momentum in enumerate(job.momenta):
        param = None if job.params is None else job.params[i]
        wide = compute_dtype(param)
        m = momentum.to_float() if isinstance(momentum, EightBit) else momentum.clone()
        m = m.to(wide)
        new, u = m, m.sign()
        skipped = False
        if job.grads is not None:
            g = job.grads[i].to(wide)
            skipped = job.shrink is not None and not bool(g.isfinite().all())
            u = (job.a * m + job.b * g).sign()
            new = job.c * m + job.d * g
        if skipped:
            new = m
        lost.append(skipped)
        mask = None
        rows = None if job.rows is None else job.rows[i]
        if rows is not None:
            last = m.shape[-1] if m.dim() else 1
            mask = rows.view(-1, 1).expand(-1, last).reshape(m.shape)
        if mask is not None and job.mask_momentum:
            new = torch.where(mask, new, m)
        if param is not None and m.numel():
            theta = param.to(wide)
            if skipped and job.shrink is not None and job.centers is not None:
                moved = (theta - job.centers[i]) * job.shrink + job.centers[i]
            elif job.moves and not (job.skip is not None and bool(job.skip[i])):
                lr = torch.as_tensor(job.lr[i], dtype=torch.float64)
                decay = torch.as_tensor(job.weight_decay[i], dtype=torch.float64)
                floor = torch.as_tensor(job.floor[i], dtype=torch.float64)
                if job.relative is not None and job.relative[i] is not None:
                    squares = theta.double().square()
                    if job.relative[i] == "rows" and theta.dim():
                        mean = squares.mean(-1, keepdim=True)
                    else:
                        mean = squares.mean()
                    lr = lr * mean.sqrt().to(wide).double().maximum(floor)
                w = (1 - lr * decay).to(wide)
                moved = w * theta - lr.to(wide) * u
            else:
                moved = theta
            if mask is not None:
                moved = torch.where(mask, moved, theta)
            if param.dtype == torch.bfloat16 and job.seed is not None:
                param.copy_(round_stochastically(moved, job.seed, i))
            else:
                param.copy_(moved)
        if job.grads is not None and not skipped:
            if isinstance(momentum, EightBit):
                momentum.set_(new)
            else:
                momentum.copy_(new)
    return None if job.shrink is None else torch.tensor(lost, dtype=torch.bool, device="cpu")


def round_stochastically(values: Tensor, seed: int, index: int) -> Tensor:
    """bfloat16, up with the probability that makes the expectation exact (contract.keys' bits)."""
    k0, k1 = keys(seed, index)
    full = (1 << 32) - 1
    h = (torch.arange(values.numel(), device="cpu") + k0) & full
    h ^= h >> 16
    h = (h * 0x85EBCA6B) & full
    h ^= h >> 13
    h ^= k1
    h = (h * 0xC2B2AE35) & full
    h ^= h >> 16
    bits = values.contiguous().view(torch.int32).view(-1).long()
    up = ((bits + (h & 0xFFFF).to(bits.device)) >> 16 << 16).to(torch.int32)
    rounded = up.view(torch.float32).view(values.shape)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
