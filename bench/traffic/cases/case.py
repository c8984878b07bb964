"""One call whose bytes are counted, and what it has to move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cards import Card


@dataclass(frozen=True)
class Shape:
    """x [m, k], W [n, k], A [r, k], B [n, r], of ``dtype``, with a card's tiles."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    card: Card


@dataclass(frozen=True)
class Case:
    """``run`` makes the launches and returns what they were asked for: with ``inputs`` (by the
    kernels' names for them, or, where a kernel finds them by address, by any) that is the floor,
    each read or written once.

    passes: the inputs that are large, and how often the kernels may ask for each: more than once
    only where it comes from the L2 cache after the first time. parts: bytes of partial sums, as the
    launcher's own grid gives them; ``why`` there are any.
    """

    name: str
    inputs: Mapping[str, Tensor]
    run: Callable[[], Sequence[Tensor]]
    passes: Mapping[str, int]
    parts: int = 0
    why: str = ""


def randn(shape: Shape, *sizes: int) -> Tensor:
    """Values do not matter, but that they are ordinary does."""
    made: Any = torch.randn(*sizes, generator=torch.Generator().manual_seed(0))
    return made.to(shape.dtype)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
