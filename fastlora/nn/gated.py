"""Gated products that need not be kept: act(gate) ∘ up is computed again in backward.

A gated block hands its last layer h = act(gate) ∘ up. Autograd then keeps four tensors of h's size:
gate, up, act(gate) and, for the adapter's gradient, h. The last two follow from the first two, bit
for bit, in two passes over memory. So where a layer's input was made in just this way, which its
autograd graph tells, the layer is put onto gate and up instead, and what lies between goes free
with the model's own references to it. The model's code is neither known nor changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_hooks_on_top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class _Product(NamedTuple):
    """h = activation(gate) ∘ up. ``slope``(dh, gate) is the activation's backward."""

    gate: Tensor
    up: Tensor
    activation: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


@contextmanager
def without_keeping(x: Tensor) -> Iterator[Tensor]:
    """Gives x, and lets what is called inside save it for backward at no cost if it is a gated
    product: then x comes back on the graph of its factors, to be used instead.
    """
    product = _find(x)
    if product is None:
        yield x
        return
    own: Tensor = _Gated.apply(product.gate, product.up, x.detach(), product)
    place, shape = own.data_ptr(), own.shape

    def pack(tensor: Tensor) -> Any:
        if tensor.data_ptr() == place and tensor.shape == shape:
            return product
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield own


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Product):
        with torch.no_grad():
            return packed.activation(packed.gate).mul_(packed.up)
    return packed


def _find(x: Tensor) -> _Product | None:
    """The product that x is, if its graph shows it and nobody looks at what lies between."""
    node: Any = x.grad_fn
    if node is None or node.name() != "MulBackward0" or not torch.is_grad_enabled():
        return None
    if x._backward_hooks or x.retains_grad or x._version:
        return None
    # what somebody else packs is not to be unpacked here: a checkpoint would recompute at once
    if _hooks_on_top is None or _hooks_on_top(True) is not None:
        return None
    children: list[Any] = [child for child, _ in node.next_functions]
    for position, inner in enumerate(children):
        if inner is None or inner.name() not in _ACTIVATIONS:
            continue
        try:
            gate = inner._saved_self
            up = node._saved_other if position == 0 else node._saved_self
        except RuntimeError:  # freed, or changed in place since
            return None
        fits = all(
            type(factor) is Tensor and factor.shape == x.shape and factor.dtype == x.dtype
            for factor in (gate, up)
        )
        return _Product(gate, up, *_ACTIVATIONS[inner.name()](inner)) if fits else None
    return None


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
    def forward(ctx: Any, gate: Tensor, up: Tensor, value: Tensor, product: _Product) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.functions = product.activation, product.slope
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gate, up = ctx.saved_tensors
        activation, slope = ctx.functions
        dgate = slope(dh * up, gate) if ctx.needs_input_grad[0] else None
        dup = activation(gate).mul_(dh) if ctx.needs_input_grad[1] else None
        return dgate, dup, None, None
