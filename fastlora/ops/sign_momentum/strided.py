"""Tensors of any strides, for kernels that take row-major ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.sign_momentum.contract import Job
from fastlora.ops.sign_momentum.eight_bit import EightBit


def row_major(job: Job, update: Callable[[Job], Tensor | None]) -> Tensor | None:
    """The update of row-major copies, which then are copied back."""
    plain = replace(
        job,
        params=None if job.params is None else [_plain(param) for param in job.params],
        grads=None if job.grads is None else [_plain(grad) for grad in job.grads],
        momenta=[m if isinstance(m, EightBit) else _plain(m) for m in job.momenta],
    )
    lost = update(plain)
    owners = [*job.momenta, *(job.params or ())]
    copies = [*plain.momenta, *(plain.params or ())]
    with torch.no_grad():
        for own, copy in zip(owners, copies, strict=True):
            if own is not copy and isinstance(own, Tensor) and isinstance(copy, Tensor):
                own.copy_(copy)
    return lost


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


def say_written(job: Job) -> None:
    """So that autograd notices a tensor that it had saved."""
    written: list[Any] = [*(job.params or ()), *job.momenta]
    if EightBit in map(type, job.momenta):
        written = [tensor for tensor in written if isinstance(tensor, Tensor)]
    torch.autograd.graph.increment_version(written)
