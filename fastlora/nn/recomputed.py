"""Inputs that need not be kept: they are computed again in backward from what is kept anyway.

For the adapter's gradient a layer keeps its input x. Often x is a product of tensors that autograd
keeps for reasons of its own, as the graph that x hangs on shows:

* a norm, x = w ∘ (h · ρ), where h and ρ are kept for the norm's own gradient;
* a gate, x = act(gate) ∘ up. Here act(gate) is kept only for the sake of the product, too; so the
  layer is put onto gate and up, and with the model's own references to it act(gate) goes free.

Both come back bit for bit, in a pass or two over memory. The model's code is neither known nor
changed: what looks otherwise is kept as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Recipe = Callable[[], Tensor]

_hooks_on_top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_MOST_STEPS = 4  # nodes between x and what is kept: a norm in half precision takes three


class _Gate(NamedTuple):
    """act(gate) ∘ up: the factors, the activation and its backward, ``slope``(d, gate)."""

    gate: Tensor
    up: Tensor
    activation: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]

    def __call__(self) -> Tensor:
        return self.activation(self.gate).mul_(self.up)


@contextmanager
def without_keeping(x: Tensor) -> Iterator[Tensor]:
    """Gives x, to be used inside in its stead, so that saving it for backward costs nothing where
    it can be computed again.
    """
    recipe = find(x)
    if recipe is None:
        yield x
        return
    if isinstance(recipe, _Gate):
        x = _Gated.apply(recipe.gate, recipe.up, x.detach(), recipe)
    place, shape, dtype = x.data_ptr(), x.shape, x.dtype

    def pack(tensor: Tensor) -> Tensor | _Again:
        if tensor.data_ptr() == place and tensor.shape == shape and tensor.dtype == dtype:
            return _Again(recipe)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield x


class _Again(NamedTuple):
    """Stands for a tensor that is not kept."""

    recipe: Recipe


def _unpack(packed: Tensor | _Again) -> Tensor:
    if isinstance(packed, _Again):
        with torch.no_grad():
            return packed.recipe()
    return packed


def find(x: Tensor) -> Recipe | None:
    """What computes x again from tensors that are kept anyway; None where there is no such thing,
    or where somebody else looks at what lies between."""
    if x.grad_fn is None or not torch.is_grad_enabled():
        return None
    if x._backward_hooks or x.retains_grad or x._version:
        return None
    # these cannot enter a custom Function such as _Gated
    if (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return None
    # what somebody else packs is not to be unpacked here: a checkpoint would recompute at once
    if _hooks_on_top is None or _hooks_on_top(True) is not None:
        return None
    try:
        gate = _gate(x)
        recipe: Any = _replay(x.grad_fn, _MOST_STEPS) if gate is None else gate
    except (AttributeError, RuntimeError):  # another PyTorch's graph; freed, or changed in place
        return None
    # a view of something larger, or a layout of its own, is not what the recipe would give
    return recipe if x._base is None and x.is_contiguous() else None


def _gate(x: Tensor) -> _Gate | None:
    node: Any = x.grad_fn
    if node.name() != "MulBackward0":
        return None
    for position, (child, _) in enumerate(node.next_functions):
        if child is None or child.name() not in _ACTIVATIONS:
            continue
        gate = child._saved_self
        up = node._saved_other if position == 0 else node._saved_self
        for factor in (gate, up):
            if type(factor) is not Tensor or factor.shape != x.shape or factor.dtype != x.dtype:
                return None
        return _Gate(gate, up, *_ACTIVATIONS[child.name()](child))
    return None


def _replay(node: Any, steps: int) -> Recipe | None:
    """What computes the output of this node of a graph from kept tensors; None if it is unknown."""
    if node is None or steps == 0:
        return None
    children = [child for child, _ in node.next_functions]
    if node.name() == "ToCopyBackward0":
        wide = _replay(children[0], steps - 1)
        return None if wide is None else partial(_cast, wide, node._input_metadata[0].dtype)
    if node.name() != "MulBackward0":
        return None
    factors: list[Tensor | Recipe] = []
    for saved, child in zip((node._saved_self, node._saved_other), children, strict=True):
        if type(saved) in (Tensor, torch.nn.Parameter):
            factors.append(saved.detach())
            continue
        inner = _replay(child, steps - 1)
        if inner is None:
            return None
        factors.append(inner)
    return partial(_product, *factors)


def _cast(of: Recipe, dtype: torch.dtype) -> Tensor:
    return of().to(dtype)


def _product(one: Tensor | Recipe, other: Tensor | Recipe) -> Tensor:
    one, other = (x if isinstance(x, Tensor) else x() for x in (one, other))
    return one * other


def _silu(node: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return torch.ops.aten.silu, torch.ops.aten.silu_backward


def _gelu(node: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    kind = node._saved_approximate
    return (
        partial(torch.ops.aten.gelu, approximate=kind),
        partial(torch.ops.aten.gelu_backward, approximate=kind),
    )


_ACTIVATIONS = {"SiluBackward0": _silu, "GeluBackward0": _gelu}


class _Gated(torch.autograd.Function):
    """h as a function of gate and up; ``value`` is what it was computed to be."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, value: Tensor, recipe: _Gate) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.functions = recipe.activation, recipe.slope
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gate, up = ctx.saved_tensors
        activation, slope = ctx.functions
        dgate = slope(dh * up, gate) if ctx.needs_input_grad[0] else None
        dup = activation(gate).mul_(dh) if ctx.needs_input_grad[1] else None
        return dgate, dup, None, None
