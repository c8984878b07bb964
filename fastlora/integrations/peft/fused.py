"""What every fused layer has in common: the class it stands in for, and what it remembers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastlora.nn.group import InputGroup
from fastlora.ops.weight_norm import WeightNormCache


class Memory:
    """What fastlora keeps of a fused layer. None of it is saved, and a copy starts afresh.

    ``group`` and ``slot``: the layers that read the same input. ``now``: the input and what the
    layer computes with, while it asks the group; ``given``: what the group then computed its output
    from. ``norms``: DoRA's, by adapter. ``shared``: what is kept once for the whole model. ``own``:
    what else the layer's kind keeps.
    """

    def __init__(self, group: InputGroup | None = None, slot: int = 0, shared: Any = None) -> None:
        self.group = group
        self.slot = slot
        self.shared = shared
        self.now: Any = None
        self.given: Any = None
        self.norms: dict[str, WeightNormCache] = {}
        self.own: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, (self.group, self.slot, self.shared)

    def norm_of(self, adapter: str) -> WeightNormCache:
        cache = self.norms.get(adapter)
        if cache is None:
            cache = self.norms[adapter] = WeightNormCache()
        return cache


class Fused:
    """A layer of one of peft's classes whose ``forward`` is ours.

    A subclass derives from ``peft_class`` first (Python gives an object another class only where
    that is the new one's first base), so it takes ``forward`` and ``_get_name`` from here by name;
    and it gives ``never``, ``look``, ``summary`` and ``fused_forward``.
    """

    __slots__ = ()
    peft_class: ClassVar[Any]
    _fastlora: Memory

    @staticmethod
    def never(layer: Any) -> str | None:
        """Why this layer of ``peft_class`` cannot be fused at all, as a sentence."""
        raise NotImplementedError

    @staticmethod
    def look(layer: Any, x: Tensor | None = None) -> Any:
        """What the layer, as it is now, computes with; or the reason, a str, why peft's forward
        is to run, for any input or for this one. The active adapter comes first."""
        raise NotImplementedError

    @staticmethod
    def summary(layer: Any, sources: Any) -> str:
        """What a report says of the adapter."""
        raise NotImplementedError

    def fused_forward(self, x: Tensor) -> Tensor | None:
        """The output; None where peft's forward is to run."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, Fused):  # somebody still holds this method of a restored layer
            return type(self).forward(self, x, *args, **kwargs)
        if not args and not kwargs:
            y = self.fused_forward(x)
            if y is not None:
                return y
        return self.peft_class.forward(self, x, *args, **kwargs)

    def _get_name(self) -> str:
        return self.peft_class.__name__  # the printed model stays as peft prints it
