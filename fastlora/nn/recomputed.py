"""Inputs that need not be kept: they are computed again in backward from what is kept anyway.

For the adapter's gradient a layer keeps its input x. Often x is a product of tensors that autograd
keeps for reasons of its own, as the graph that x hangs on shows:

* a norm, x = w ∘ (h · ρ), where h and ρ are kept for the norm's own gradient;
* a gate, x = act(gate) ∘ up. Here act(gate) is kept only for the sake of the product, too; so what
  the product keeps of it is replaced by what computes it, and with the model's own references to
  it act(gate) goes free.

Both come back bit for bit, in a pass or two over memory. The model's code is neither known nor
changed, and the graph stays as it is, with its hooks and retained gradients. What looks otherwise
is kept as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops.adapter_linear.entry import is_transformed

Recipe = Callable[[], Tensor]

_hooks_on_top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_MOST_STEPS = 4  # nodes between x and what is kept: a norm in half precision takes three


class _Activation:
    """act(gate), as often as it is asked for. Backward asks twice, for the layer's input and then
    for the product's own gradient: ``for_product`` takes what ``for_layer`` has left it. A backward
    that does not come to the product leaves it there as long as the graph lives."""

    def __init__(self, function: Callable[[Tensor], Tensor], gate: Recipe) -> None:
        self._function, self._gate = function, gate
        self._left: Tensor | None = None
        self.product_asks = False

    def for_layer(self) -> Tensor:
        """One that may not be written into where ``product_asks``."""
        found = self._function(self._gate())
        if self.product_asks:
            self._left = found
        return found

    def for_product(self) -> Tensor:
        gate = self._gate()  # which says so if it has been changed since
        found, self._left = self._left, None
        return self._function(gate) if found is None else found


class _Gate(NamedTuple):
    """act(gate) ∘ up; ``slot`` is where the product's node keeps act(gate)."""

    activation: _Activation
    up: Recipe
    slot: str

    def __call__(self) -> Tensor:
        activation, up = self.activation.for_layer(), self.up()
        return activation * up if self.activation.product_asks else activation.mul_(up)

    def free_activation(self, product: Any) -> None:
        recipe = self.activation.for_product
        # not kept, as up is frozen; or replaced before, for another layer that reads x
        with suppress(RuntimeError):
            getattr(product, self.slot).register_hooks(lambda _: recipe, _unpack)
            self.activation.product_asks = True


def spare(x: Tensor, *results: Tensor) -> None:
    """Frees a layer's input x, kept for the backward of ``results``, if it can be computed again.

    Our autograd Functions keep it as the first thing they save; other nodes are left as they are.
    """
    nodes: set[Any] = {y.grad_fn for y in results if y.grad_fn is not None}
    recipe = find(x) if nodes else None
    if recipe is None:
        return
    place, shape, dtype = x.data_ptr(), x.shape, x.dtype

    def pack(tensor: Tensor) -> Recipe:
        if tensor.data_ptr() == place and tensor.shape == shape and tensor.dtype == dtype:
            return recipe
        return _kept(tensor)

    for node in nodes:
        # not where it is no Function's node, or one that keeps no input
        with suppress(AttributeError, IndexError, RuntimeError):
            node._raw_saved_tensors[0].register_hooks(pack, _unpack)
    if isinstance(recipe, _Gate):
        recipe.free_activation(x.grad_fn)


def _unpack(recipe: Recipe) -> Tensor:
    if not torch.is_grad_enabled():  # as in any backward that is not itself differentiated
        return recipe()
    with torch.no_grad():
        return recipe()


def find(x: Tensor) -> Recipe | None:
    """What computes x again from tensors that are kept anyway; None if there is no such thing."""
    if x.grad_fn is None or x._version or not torch.is_grad_enabled() or is_transformed(x):
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
        activation = _Activation(_ACTIVATIONS[child.name()](child), _kept(gate.detach()))
        return _Gate(activation, _kept(up.detach()), "_raw_saved_" + ("self", "other")[position])
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
    factors: list[Recipe] = []
    for saved, child in zip((node._saved_self, node._saved_other), children, strict=True):
        if type(saved) in (Tensor, torch.nn.Parameter):
            factors.append(_kept(saved.detach()))
            continue
        inner = _replay(child, steps - 1)
        if inner is None:
            return None
        factors.append(inner)
    return partial(_product, *factors)


def _cast(of: Recipe, dtype: torch.dtype) -> Tensor:
    return of().to(dtype)


def _product(one: Recipe, other: Recipe) -> Tensor:
    return one() * other()


def _kept(tensor: Tensor) -> Recipe:
    """Gives the tensor as it is now. Autograd leaves it to those who pack tensors to see that."""
    return partial(_unchanged, tensor, tensor._version)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; "
            f"expected version {version} instead"
        )
    return tensor


# by the name of its node, what gives the activation
_ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "SiluBackward0": lambda node: torch.ops.aten.silu,
    "GeluBackward0": lambda node: partial(torch.ops.aten.gelu, approximate=node._saved_approximate),
}
