"""The eager form with its float32 products run by oneDNN instead of MKL."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastlora.ops.adapter_group import eager
from fastlora.ops.adapter_linear.onednn import linear

_NARROW = 64

draw_seed = eager.draw_seed


def onto(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, fresh: bool = False) -> None:
    """out [m, n] += alpha · a [m, k] b [n, k]ᵀ; ``fresh``: out holds nothing yet."""
    if min(a.shape[1], *out.shape) <= _NARROW:
        eager.aten_onto(out, a, b, alpha, fresh)
    elif fresh:
        torch.mul(linear(a, b), alpha, out=out)
    else:
        out.add_(linear(a, b), alpha=alpha)


forward = partial(eager.forward, linear=linear, onto=onto)
backward = partial(eager.backward, linear=linear, onto=onto)
