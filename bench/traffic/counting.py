"""Counts every load and store of Triton kernels while the interpreter runs them.

Inside ``counted()`` the interpreter's builder and launcher are wrapped; outside, nothing is left
of that. A masked-out element counts nothing. Run with the interpreter of Triton 3.7.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

SECTOR = 32  # bytes: what a GPU's memory moves at a time
_IN_A_LINE = 4


@dataclass
class Access:
    """One load or store of one program: the sectors it touches, each once.

    lines: (line of four sectors, which of them as bits).
    """

    operand: str
    is_store: bool
    lines: list[tuple[int, int]]


@dataclass
class Launch:
    """One kernel launch. ``size`` is each tensor argument's bytes, ``asked`` and ``stored`` the
    unmasked bytes of its loads and stores, ``programs`` their accesses in a GPU's launch order."""

    kernel: str
    grid: tuple[int, int, int]
    size: dict[str, int]
    asked: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    programs: list[list[Access]] = field(default_factory=list)


@contextmanager
def counted(beside: Mapping[str, Any] | None = None) -> Iterator[list[Launch]]:
    """The launches that are made inside, in order.

    Accesses are named after the argument whose memory they are in, else after the tensor of
    ``beside`` (kernels find some by addresses that they read), else "?".

    Raises RuntimeError for a kernel that uses atomics, which are not counted.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    launches: list[Launch] = []
    here: list[tuple[Launch, list[tuple[int, int, str]]]] = []
    call = interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        known = inspect.signature(self.fn).parameters
        given = {name: value for name, value in options.items() if name in known}
        bound = inspect.getcallargs(self.fn, *args, **given)
        tensors = {name: value for name, value in bound.items() if hasattr(value, "data_ptr")}
        grid = self.grid(bound) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        size = {name: one.numel() * one.element_size() for name, one in tensors.items()}
        made = Launch(self.fn.__name__, grid, size)
        made.programs = [[] for _ in range(grid[0] * grid[1] * grid[2])]
        spans = []
        for name, one in (*tensors.items(), *(beside or {}).items()):
            # strides may lead through more memory than the tensor has elements
            last = sum((n - 1) * s for n, s in zip(one.shape, one.stride(), strict=True))
            begin = one.data_ptr()
            spans.append((begin, begin + (last + 1) * one.element_size(), name))
        launches.append(made)
        here.append((made, spans))
        try:
            return call(self, *args, **options)
        finally:
            here.pop()

    def note(pointers: Any, mask: Any, is_store: bool) -> None:
        if not here:
            return
        made, spans = here[-1]
        addresses, kept = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[kept.astype(bool)].astype(np.int64)
        if not addresses.size:
            return
        item = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        operand = next((name for low, high, name in spans if low <= addresses[0] < high), "?")
        (made.stored if is_store else made.asked)[operand] += addresses.size * item
        x, y, z = (int(i) for i in builder.grid_idx)
        position = x + made.grid[0] * (y + made.grid[1] * z)  # x runs fastest on a GPU
        made.programs[position].append(Access(operand, is_store, _lines(addresses)))

    def counted_load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note(pointers, mask, False)
        return load(pointers, mask, *rest, **options)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note(pointers, mask, True)
        return store(pointers, value, mask, *rest, **options)

    def refuse(*args: Any, **options: Any) -> Any:
        raise RuntimeError("atomics are not counted")

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", refuse),
        mock.patch.object(builder, "create_atomic_cas", refuse),
    ):
        yield launches


def _lines(addresses: np.ndarray) -> list[tuple[int, int]]:
    sectors = addresses // SECTOR
    # neighbours first, which leaves little to sort
    sectors = np.unique(sectors[np.r_[True, sectors[1:] != sectors[:-1]]])
    lines, place = np.divmod(sectors, _IN_A_LINE)
    starts = np.flatnonzero(np.r_[True, lines[1:] != lines[:-1]])
    which = np.add.reduceat(1 << place, starts)
    return list(zip(lines[starts].tolist(), which.tolist(), strict=True))
