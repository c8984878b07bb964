"""What the methods that hang on an optimizer's step hooks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.view import AdapterLayer


class StepMethod:
    """A method that hangs on an optimizer's step hooks."""

    _layers: list[AdapterLayer]  # what it works on while it is attached


def inner_optimizer(
    optimizer: Any, found: Sequence[AdapterLayer], parts: Sequence[str]
) -> torch.optim.Optimizer:
    """The optimizer to hang on: what is given, or what ``accelerate`` has wrapped in it.

    Raises ValueError if one of the layers' ``parts`` (keys of their tensors) is not the
    optimizer's; RuntimeError if another method hangs on it for one of these layers.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    check_owned(optimizer, found, parts)
    hooks = optimizer._optimizer_step_pre_hooks.values()
    taken = {
        id(layer.lora_B): type(other).__name__
        for other in (getattr(hook, "__self__", None) for hook in hooks)
        if isinstance(other, StepMethod)
        for layer in other._layers
    }
    for layer in found:
        if other := taken.get(id(layer.lora_B)):
            raise RuntimeError(
                f"{layer.name} has a {other} on this optimizer already; detach it first"
            )
    return optimizer


def check_owned(
    optimizer: torch.optim.Optimizer, found: Sequence[AdapterLayer], parts: Sequence[str]
) -> None:
    """Raise ValueError if one of the layers' ``parts`` is not the optimizer's."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in found:
        for part in parts:
            if id(layer.tensors[part]) not in owned:
                raise ValueError(f"{part} of {layer.name} is not the optimizer's")


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether GradScaler leaves this step out. It calls ``step`` of a fused optimizer all the same,
    whose kernel then changes nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


@torch.no_grad()
def unscale(optimizer: Any) -> None:
    """Divide the gradients by GradScaler's scale where it left that to a fused kernel, which would
    do so after a method has read them."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    if gradients:
        torch._foreach_div_(gradients, float(scale))
    optimizer.grad_scale = None


def refuse_no_gradients(method: str, trained: Sequence[object]) -> None:
    """Raise RuntimeError if not one layer of a method has a gradient."""
    if not trained:
        raise RuntimeError(
            f"no layer of {method} has a gradient: call backward before the step, leave gradients "
            "there (accumulate_in_momentum does not), and attach to the adapters that are trained"
        )


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


def check_entries(what: str, state: Mapping[str, Any], wanted: Iterable[str]) -> None:
    """Raise ValueError, naming it, if a saved state lacks an entry."""
    for entry in wanted:
        if entry not in state:
            raise ValueError(f"{what} has no {entry}")
