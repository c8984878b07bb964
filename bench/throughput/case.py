"""What is timed: cells, the providers that compute them, and what an operation must bring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Cell(NamedTuple):
    """One row of the table: an operation at one shape."""

    op: str
    model: str
    layer: str
    n: tuple[int, ...]  # the width of each layer; of svd_product, of each product
    k: tuple[int, ...]
    m: int  # tokens; 0 where there are none
    rank: int
    dropout: float
    dtype: str
    device: str

    @property
    def element(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def title(self) -> str:
        said = [self.op, self.model, self.layer]
        said += [f"M={self.m}"] if self.m else []
        said += [f"r={self.rank}"] if self.rank else []
        said += [f"p={self.dropout:g}"] if self.dropout else []
        return " ".join([*said, self.dtype])


class Request(NamedTuple):
    """What the command line asks for; an operation makes its cells from it."""

    shapes: Sequence[str]  # models
    layers: Sequence[str] | None  # None: all
    m: Sequence[int]
    rank: Sequence[int]
    dropout: Sequence[float]
    dtype: Sequence[str]
    device: str


class Work(NamedTuple):
    """What no way of computing a pass can do without: the products, each operand moved once."""

    flops: float
    moved: float  # bytes


@dataclass
class Step:
    """A provider at one set of operands.

    ``forward`` gives the results; with ``leaves``, a backward from the operands' ``dys`` follows
    and gives their gradients, under the leaves' names. ``before`` runs untimed ahead of each call.
    """

    forward: Callable[[], Sequence[Tensor]]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    before: Callable[[], object] | None = None


class Unavailable(Exception):
    """A provider cannot compute a cell here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation.

    ``build(cell, operands)`` raises Unavailable where it cannot. ``computes`` names which of the
    operation's exact results its own are held against.
    """

    name: str
    build: Callable[[Cell, Any], Step]
    computes: str = "adapted"
    keep_scale: Callable[[float], float] = lambda p: 1 / (1 - p)


Results = dict[str, Tensor]  # values "y0", "y1", …; gradients "dx", "dA0", …


class Verdict(NamedTuple):
    """How far a provider is off, by result, and what is wrong with that; nothing if it is right."""

    errors: dict[str, float]
    wrong: str | None


@dataclass(frozen=True)
class Operation:
    """An operation: its cells, their operands and providers, the exact results, the work.

    ``passes``: "forward" and "backward" for what is differentiated (with "both", their sum), else
    one name. ``rival`` is whom ours are compared with, ``chosen`` tells which of ours is taken
    automatically. ``check`` replaces the ladder of check.py for operations that are not functions
    of their operands alone. ``set_bytes`` is how large one set of operands is, results included.
    """

    name: str
    about: str
    passes: tuple[str, ...]
    rival: str
    cells: Callable[[Request], Iterable[Cell]]
    operands: Callable[[Cell, int], Any]
    providers: Callable[[Cell], list[Provider]]
    chosen: Callable[[Cell], str]
    work: Callable[[Cell, str], Work]
    set_bytes: Callable[[Cell], int]
    exact: Callable[[Cell, Any, str, list[Tensor] | None, float], Results] | None = None
    probe: Callable[[Cell, int], Any] | None = None  # operands whose dx shows member i's mask
    check: Callable[[Cell, Any, dict[str, Step]], dict[str, Verdict]] | None = None


def run(step: Step, dys: Sequence[Tensor], mark: Callable[[], None]) -> Results:
    """One call, ``mark`` between forward and backward."""
    if not step.leaves:
        with torch.no_grad():
            ys = step.forward()
        return {f"y{i}": y for i, y in enumerate(ys)}
    ys = step.forward()
    mark()
    gradients = torch.autograd.grad(ys, list(step.leaves.values()), dys)
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return found | dict(zip(step.leaves, gradients, strict=True))
