"""A model of a GPU's L2 cache: least recently used goes first, stores stay until they go.

What it leaves out: associativity, hashing of addresses, prefetching, and how far programs that run
at the same time really drift apart. Programs are taken to advance together, one access each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from bench.traffic.counting import SECTOR, Launch

Step = TypeVar("Step")


class Cache:
    """``read`` and ``written`` are the bytes that memory has given and taken so far."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.read = self.written = 0
        # a line's bytes in a unit, which of its units are held, and which are dirty
        self._lines: OrderedDict[Hashable, tuple[int, int, int]] = OrderedDict()
        self._bytes = 0

    def touch(self, line: Hashable, unit: int, is_store: bool, which: int = 1) -> None:
        """One access to some units of a line, the bits of ``which``; a store fills them."""
        _, held, dirty = self._lines.pop(line, (unit, 0, 0))
        missing = unit * (which & ~held).bit_count()
        self._bytes += missing
        if is_store:
            dirty |= which
        else:
            self.read += missing
        self._lines[line] = unit, held | which, dirty
        while self._bytes > self.capacity and len(self._lines) > 1:
            _, (own, gone, dirty) = self._lines.popitem(last=False)
            self._bytes -= own * gone.bit_count()
            self.written += own * dirty.bit_count()

    def flush(self) -> None:
        """What is dirty goes to memory: nobody here reads it again."""
        self.written += sum(unit * dirty.bit_count() for unit, _, dirty in self._lines.values())
        self._lines.clear()
        self._bytes = 0

    @property
    def moved(self) -> int:
        return self.read + self.written


def in_turns(programs: Sequence[Sequence[Step]], resident: int) -> Iterator[Step]:
    """The steps of ``resident`` programs at a time, one each in turn; one that ends is replaced by
    the next."""
    waiting = iter(programs)
    running = [iter(program) for program in islice(waiting, resident)]
    while running:
        going = []
        for program in running:
            step = next(program, None)
            while step is None:
                following = next(waiting, None)
                if following is None:
                    break
                program = iter(following)
                step = next(program, None)
            if step is not None:
                going.append(program)
                yield step
        running = going


def replay(launches: Sequence[Launch], capacity: int, resident: int) -> Cache:
    """The memory traffic of launches one after another, from a cold cache."""
    cache = Cache(capacity)
    for launch in launches:
        for access in in_turns(launch.programs, resident):
            for line, sectors in access.lines:
                cache.touch(line, SECTOR, access.is_store, sectors)
    cache.flush()
    return cache
