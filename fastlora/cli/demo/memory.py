"""What one forward and backward keep and need: counted, outside any timed step."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

CPU_METHOD = "live allocations in torch.profiler's memory record: after the forward, and at most"
CUDA_METHOD = "torch.cuda.memory_allocated after the forward, max_memory_allocated of the step"


def saved_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that are alive between forward and backward and were not before: what is kept.

    ``forward`` returns the loss; it runs once before, so that caches it fills are not counted.
    """
    with torch.no_grad():
        forward()
    held: list[Tensor] = []  # as in a training step, the loss alone holds the graph
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        resident = torch.cuda.memory_allocated(device)
        held.append(forward())
        return torch.cuda.memory_allocated(device) - resident
    return sum(_changes(lambda: held.append(forward())))


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at one time during ``step``, above what was there when it began."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        resident = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - resident
    return max(itertools.accumulate(_changes(step)), default=0)


def _changes(step: Callable[[], object]) -> list[int]:
    """Bytes allocated (positive) and freed (negative) on the CPU during ``step``, in order."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with _without_native_log():
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                step()
            profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(found, key=lambda event: event["ts"])]


@contextlib.contextmanager
def _without_native_log() -> Iterator[None]:
    """Keep the profiler's native start and stop messages off the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
