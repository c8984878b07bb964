"""The eager form with its float32 products run by oneDNN instead of MKL."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fastlora.ops.adapter_group import eager
from fastlora.ops.adapter_linear.eager import InPlace
from fastlora.ops.adapter_linear.onednn import linear

draw_seed = eager.draw_seed


def onto(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [m, n] += a [m, k] · b [n, k]ᵀ, float32, on the CPU."""
    out.add_(linear(a, b))


forward = partial(eager.forward, linear=linear)
backward = partial(eager.backward, linear=linear, gradient=partial(InPlace, onto=onto))
