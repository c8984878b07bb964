"""What the fused linear layers have in common: ``adapter_linear``, alone or for a whole group."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastlora.integrations.peft.fused import Fused
from fastlora.nn.compute import compute
from fastlora.nn.plain import added_behaviour
from fastlora.ops.adapter_group import Member


class FusedLinearKind(Fused):
    """A linear layer of the family. A subclass gives ``operands``, too, and names in ``hidden`` the
    places of those tensors in what ``look`` finds that the operation does not get as they are."""

    __slots__ = ()
    hidden: tuple[int, ...] = ()

    def operands(self, sources: Any, x: Tensor) -> Member:
        """What ``look`` found, as ``adapter_linear`` takes it."""
        raise NotImplementedError

    def fused_forward(self, x: Tensor) -> Tensor | None:
        sources = self.look(self, x)
        if isinstance(sources, str):
            return None
        memory = self._fastlora
        if memory.group is not None and not torch.compiler.is_compiling():
            memory.now = x, sources
            try:
                y = memory.group.result(self, memory.slot, x)
            finally:
                memory.now = None
            given, memory.given = memory.given, None
            if y is not None and self._is(given, sources):
                return y
        return compute(x, self.operands(sources, x))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.peft_class.__setstate__(self, state)
        memory = self._fastlora
        if memory.group is not None:
            memory.group.join(self, memory.slot)  # the copy of a group starts empty

    def member(self, x: Tensor) -> Member | None:
        """See ``nn.group.Joining``."""
        if added_behaviour(self):  # type: ignore[arg-type]
            return None
        memory = self._fastlora
        now = memory.now
        sources = now[1] if now is not None and now[0] is x else self.look(self, x)
        if isinstance(sources, str):
            return None
        memory.given = sources, self._versions(sources)
        return self.operands(sources, x)

    def settings(self) -> None:
        """See ``nn.group.Joining``: a result's sources are compared when it is taken."""

    def _is(self, given: Any, sources: Any) -> bool:
        """Whether the group's result is one of these sources: of the same tensors, unwritten, and
        the same numbers. (The group itself watches the tensors that the operation gets.)"""
        return (
            given is not None
            and all(map(is_, given[0], sources))
            and given[1] == self._versions(sources)
        )

    def _versions(self, sources: Any) -> list[int | None]:
        return [
            None if tensor.is_inference() else tensor._version
            for place in self.hidden
            if (tensor := sources[place]) is not None
        ]
