"""What the methods that hang on an optimizer's step hooks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refuse_closure(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError if a step, with these arguments of its hook, was called with a closure."""
    if has_closure(args, kwargs):
        raise RuntimeError(
            f"{method} corrects gradients before the step, and a closure computes them in it"
        )


def has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # args are those of step, the optimizer itself first
    return any(value is not None for value in (*args[1:], *kwargs.values()))


@torch.no_grad()
def first_non_finite(tensors: Sequence[Tensor]) -> int | None:
    """The index of the first tensor with a NaN or an infinity in it; None if there is none.

    A GPU is waited for once, whatever the number of tensors.
    """
    filled = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    if not filled:
        return None
    # the largest magnitude cannot overflow, as a sum of squares in half precision could
    largest = torch._foreach_norm([tensors[index] for index in filled], float("inf"))
    device = largest[0].device
    finite = torch.stack([value.to(device, torch.float64) for value in largest]).isfinite()
    if bool(finite.all()):
        return None
    return filled[int((~finite).nonzero()[0])]
