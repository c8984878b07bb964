"""``once_differentiable`` that costs nothing where nobody differentiates a backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as _once_differentiable


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's for a Function's backward. Where gradients are off, as in any backward that keeps
    no graph of its own, torch's would only turn them off again, in five microseconds a call."""
    guarded = _once_differentiable(backward)

    @functools.wraps(backward)
    def called(ctx: Any, *gradients: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return called
