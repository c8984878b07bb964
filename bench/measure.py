"""How the benches take times: contestants in turn, clocks of the device, disturbed steps again.

The contestants of a comparison run in one process and take turns, each round in another order, so
that a machine whose speed drifts slows all of them alike; ratios are taken within a round. On Linux
the process keeps the memory it frees, which would else be taken from the system again in each step.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from fastlora.cli.pages import keep_freed_pages

Mark = Callable[[], None]
Call = Callable[[Mark], object]

_LEAD = 1_000_000  # GPU clock cycles for which the first mark waits: launches are queued meanwhile


class Taken(NamedTuple):
    """Milliseconds by contestant, round and lap, and how many steps were disturbed for good."""

    laps: dict[str, list[list[float]]]
    disturbed: int

    def totals(self) -> dict[str, list[float]]:
        """Milliseconds of whole calls, by contestant and round."""
        return {name: [sum(laps) for laps in rounds] for name, rounds in self.laps.items()}


def take_turns(
    calls: Mapping[str, Call],
    rounds: int | Callable[[float], int],
    device: str,
    *,
    warmup: int = 2,
    before: Callable[[str], object] | None = None,
    again: int = 0,
    patience: float = 0.0,
    by_host: bool = False,
) -> Taken:
    """Times every call once a round, after ``warmup`` rounds that do not count.

    Args:
        calls: what is timed. Each is given a function to call between its laps.
        rounds: how many count; or a function that says so, given the seconds of the last round of
            the warm-up (which then has at least one).
        before: called with the contestant's name ahead of each call, untimed.
        again: how often a step is taken again that was disturbed. On Linux, one is if the scheduler
            let one of the process's threads wait for a processor meanwhile.
        patience: seconds that a step waits at most for a moment in which nothing else runs.
        by_host: time a GPU's work as the host sees it, waiting included.
    """
    keep_freed_pages()
    taken = Taken({name: [] for name in calls}, 0)
    disturbed = 0
    number = -warmup
    last = rounds if isinstance(rounds, int) else 1
    with _no_collection():
        while number < last:
            started = time.monotonic()
            order = list(calls)
            random.Random(number).shuffle(order)
            for name in order:
                for _ in range(1 + again):
                    settle(patience)
                    if before is not None:
                        before(name)
                    laps, alone = lap(calls[name], device, by_host)
                    if alone:
                        break
                if number >= 0:
                    taken.laps[name].append(laps)
                    disturbed += not alone
            if number == -1 and not isinstance(rounds, int):
                last = rounds(time.monotonic() - started)
            number += 1
    return taken._replace(disturbed=disturbed)


def as_calls(calls: Mapping[str, Callable[[], object]]) -> dict[str, Call]:
    """For ``take_turns``: calls of one lap."""

    def as_call(call: Callable[[], object]) -> Call:
        return lambda mark: call()

    return {name: as_call(call) for name, call in calls.items()}


def whole(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str,
    *,
    warmup: int = 2,
    by_host: bool = False,
) -> dict[str, list[float]]:
    """``take_turns`` for calls of one lap: milliseconds by contestant and round."""
    return take_turns(as_calls(calls), rounds, device, warmup=warmup, by_host=by_host).totals()


def lap(call: Call, device: str, by_host: bool = False) -> tuple[list[float], bool]:
    """(milliseconds of each lap of one call, whether nobody took a processor away meanwhile)."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not by_host:
        events: list[torch.cuda.Event] = []

        def record() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        torch.cuda.synchronize()
        torch.cuda._sleep(_LEAD)
        record()
        call(record)
        record()
        torch.cuda.synchronize()
        return [one.elapsed_time(other) for one, other in pairwise(events)], True

    read: list[int] = []

    def mark() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        read.append(time.perf_counter_ns())

    before = waited()
    mark()
    call(mark)
    mark()
    after = waited()
    took = read[-1] - read[0]
    alone = before is None or after is None or after - before <= max(took // 1000, 30_000)
    return [(end - begin) / 1e6 for begin, end in pairwise(read)], alone


def waited() -> int | None:
    """Nanoseconds that threads of this process were ready to run and had no processor; or None."""
    total = 0
    try:
        for thread in os.listdir("/proc/self/task"):
            fields = Path(f"/proc/self/task/{thread}/schedstat").read_text().split()
            total += int(fields[1])
    except (OSError, IndexError, ValueError):
        return None
    return total


def settle(seconds: float) -> None:
    """Waits, at most so long, for a moment in which nothing else runs (Linux only)."""
    deadline = time.monotonic() + seconds
    seen = 0
    while seen < 3 and time.monotonic() < deadline:
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        except (OSError, IndexError, ValueError):
            return
        seen = seen + 1 if running <= 1 else 0
        time.sleep(0.01 if seen else 0.2)


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float


def spread(values: list[float]) -> Spread:
    """Of one value or more."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector out of timed steps."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
