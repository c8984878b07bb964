"""Layers that read one input are computed together, when the first of them is called.

A model calls q_proj(x), k_proj(x), v_proj(x) one after the other. The first call computes all
three; the others, called with that very x, take their results. Nobody's code is changed: a layer
that turns out to read something else is computed by itself, and so is one that gains nothing from
the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastlora.nn.compute import compute
from fastlora.nn.recomputed import spare
from fastlora.ops.adapter_group import Member, adapter_group, gains_nothing
from fastlora.ops.adapter_linear.entry import is_transformed

# A layer is no longer computed with another after so many inputs in a row that it then did not
# read. One may be an accident: an exception, or a checkpoint that recomputes no more than it must.
_MISSES = 3

_hooks_on_top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Joining(Protocol):
    """A layer that can be computed beside others."""

    def member(self, x: Tensor) -> Member | None:
        """What it brings to ``adapter_group`` for this input; None if it runs by itself now."""

    def settings(self) -> Any:
        """What ``member`` depends on beside tensors' contents; equal where that is as it was."""


class _Pending(NamedTuple):
    """Results not yet taken: for which input, and when which layer was called; and by slot the
    operands, what state they and their layer were in, and the result."""

    x: Tensor
    leader: int
    tensors: dict[int, list[Tensor]]
    states: dict[int, Any]
    settings: dict[int, Any]
    ready: dict[int, Tensor]

    def holds(self, layer: Joining, x: Tensor, slot: int) -> bool:
        """Whether a layer's result for x is there, and nothing it depends on has changed since."""
        if x is not self.x or slot not in self.ready:
            return False
        if self.states[slot] != _state(self.tensors[slot]):
            return False
        if self.settings[slot] != layer.settings():
            return False
        # backward through one layer's result frees what the others' would read
        node = self.ready[slot].grad_fn
        return node is None or _waits(node)


class InputGroup:
    """The group of some layers, each with a slot of its own.

    A copied or unpickled group is empty: the layers that are copied with it ``join`` it, at the
    latest when they are first called. The group keeps no layer alive. Threads may share layers.

    A checkpoint (``use_reentrant=False``) that recomputes a call must find the same layers computed
    together as the first time. So while graphs that it may have to recompute wait for their
    backward, no layer is left out that was not left out before.
    """

    def __init__(self, size: int) -> None:
        self._layers: list[weakref.ref[Any] | None] = [None] * size
        self._misses: dict[tuple[int, int], int] = {}  # by (layer called, layer computed with it)
        self._left: set[tuple[int, int]] = set()  # the pairs that have missed too often
        self._waiting: list[weakref.ref[Any]] = []  # nodes of graphs that may be recomputed
        self._pending: _Pending | None = None

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> InputGroup:
        group = cls(len(layers))
        group._layers = [weakref.ref(layer) for layer in layers]
        return group

    def __reduce__(self) -> tuple[Any, ...]:
        return InputGroup, (len(self._layers),)

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGroup:
        memo[id(self)] = copied = InputGroup(len(self._layers))
        return copied

    def join(self, layer: Joining, slot: int) -> bool:
        """Take a slot that is free; whether it is this layer's then."""
        there = self._layer(slot)
        if there is None:
            self._layers[slot] = weakref.ref(layer)
            return True
        return there is layer  # DataParallel's replicas share the group of their original

    def leave(self, slot: int) -> None:
        self._layers[slot] = None

    def result(self, layer: Joining, slot: int, x: Tensor) -> Tensor | None:
        """The layer's output for x; None where it is to be computed by itself."""
        if torch.compiler.is_compiling() or is_transformed(x) or not self.join(layer, slot):
            return None
        pending = self._pending
        if pending is not None and pending.holds(layer, x, slot):
            y = pending.ready.pop(slot, None)  # None: another thread has just taken it
            self._misses.pop((pending.leader, slot), None)
            if not pending.ready:
                self._pending = None
            return y
        own = layer.member(x)
        if own is None:  # the others may still come for theirs
            return None
        if gains_nothing(x, own):
            if pending is not None and pending.x is not x:
                self._drop(pending)
            return compute(x, own)
        self._drop(pending)
        del pending  # its graph goes with it, or that would be waited for
        self._settle()
        others = self._others(slot, x, own)
        if not others:
            return None
        members = [own, *(member for _, member in others.values())]
        try:
            results = adapter_group(x, members)
        except (TypeError, ValueError):  # one does not fit: its own call will say so
            return None
        spare(x, *results)
        self._wait_for(results)
        tensors = {
            other: [x, *(operand for operand in member if isinstance(operand, Tensor))]
            for other, (_, member) in others.items()
        }
        states = {other: _state(those) for other, those in tensors.items()}
        settings = {other: layer.settings() for other, (layer, _) in others.items()}
        ready = dict(zip(others, results[1:], strict=True))
        self._pending = _Pending(x, slot, tensors, states, settings, ready)
        return results[0]

    def _layer(self, slot: int) -> Any:
        known = self._layers[slot]
        return None if known is None else known()

    def _others(self, slot: int, x: Tensor, own: Member) -> dict[int, tuple[Any, Member]]:
        found = {}
        for other in range(len(self._layers)):
            layer = self._layer(other)
            if other == slot or layer is None or (slot, other) in self._left:
                continue
            member = layer.member(x)
            if (
                member is not None
                and member.weight.dtype == own.weight.dtype
                and member.weight.device == own.weight.device
                and member.weight.shape[1] == own.weight.shape[1]
                and not gains_nothing(x, member)
            ):
                found[other] = layer, member
        return found

    def _settle(self) -> None:
        """Leave out what has missed too often, unless a checkpoint may yet recompute it."""
        self._waiting = [known for known in self._waiting if _waits(known())]
        if self._misses and not self._waiting:
            for pair, count in list(self._misses.items()):
                if count >= _MISSES:
                    self._left.add(pair)

    def _wait_for(self, results: tuple[Tensor, ...]) -> None:
        if _hooks_on_top is not None and _hooks_on_top(True) is not None:
            nodes = (y.grad_fn for y in results)
            self._waiting += [_life(node) for node in nodes if node is not None][:1]

    def _drop(self, pending: _Pending | None) -> None:
        if pending is None:
            return
        for slot in pending.ready:
            pair = pending.leader, slot
            self._misses[pair] = self._misses.get(pair, 0) + 1
        self._pending = None


class _Guest:
    """Lives in a node's metadata, as long as the node."""


def _life(node: Any) -> weakref.ref[Any]:
    """Dies with the node."""
    try:
        return weakref.ref(node)
    except TypeError:  # not a Function's, but one of PyTorch's own calls'
        return weakref.ref(node.metadata.setdefault(_Guest, _Guest()))


def _waits(node: Any) -> bool:
    """Whether the graph of this node is there and has not been gone through backward."""
    if getattr(node, "passed", None) is False:
        return True
    try:
        return node is not None and node._raw_saved_tensors is not None
    except AttributeError:  # no Function's: it is there, and that is all there is to know
        return True
    except RuntimeError:  # what it had saved is freed
        return False


def _state(tensors: list[Tensor]) -> Any:
    """What a result depends on beside its tensors' identity: writes since, no_grad, autocast,
    which of them are trained."""
    kind = tensors[0].device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:  # inference tensors have none
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
    trained = [tensor.requires_grad for tensor in tensors]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, versions, trained
