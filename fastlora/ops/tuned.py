"""What was measured to be fastest on one device: backends, algorithms and tiles.

``tables/<device>.json`` beside this module holds the choices for the device of that name
(``device_file``: "NVIDIA H200" -> "nvidia-h200.json"); ``python -m bench.tune`` writes it::

    {
      "format": "fastlora.tuned/1",
      "device": "NVIDIA H200",
      "measured": {"torch": "2.13.0", ...},
      "entries": [
        {"operation": "adapter_linear", "what": "forward", "dtype": "bfloat16",
         "M": 8192, "N": 4096, "K": 4096, "r": 16, "take": "accumulate"}
      ]
    }

"what" is "backend", a part whose algorithm is chosen ("forward", "dx"), or "tile <kernel>"; "take"
a name, or a tile's block sizes. A size that a choice does not depend on is 1. An entry serves the
calls whose sizes each lie within a factor of two of its own; the nearest one (sum of the distances
in log2) wins, the earlier of two equally near. Calls near no entry keep the choice that is made
without a table, and so does a device whose table is of another format or broken, of which a
warning tells once. A file is read once, when its device is first asked about.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "fastlora.tuned/1"
TABLES = Path(__file__).parent / "tables"
SIZES = ("M", "N", "K", "r")
DTYPES = ("float32", "float16", "bfloat16", "float64")


class TableWarning(UserWarning):
    """A table of measured choices cannot be used; said once a device."""


class Entry(NamedTuple):
    """One measured choice. ``take`` is a name, or (field, value) pairs of a tile."""

    operation: str
    what: str
    dtype: str
    sizes: tuple[int, ...]
    take: str | tuple[tuple[str, int], ...]


def choice(
    device: str, operation: str, what: str, dtype: str, sizes: tuple[int, ...] = (1, 1, 1, 1)
) -> str | dict[str, int] | None:
    """What to take for sizes (M, N, K, r); None where nothing near was measured on ``device``.

    Callers keep the answer: this looks through the device's entries.
    """
    best: tuple[float, Entry] | None = None
    for entry in entries(device, TABLES):
        if (entry.operation, entry.what, entry.dtype) != (operation, what, dtype):
            continue
        steps = [abs(log2(max(a, 1) / b)) for a, b in zip(sizes, entry.sizes, strict=True)]
        if max(steps) <= 1.0 and (best is None or sum(steps) < best[0]):
            best = (sum(steps), entry)
    if best is None:
        return None
    take = best[1].take
    return take if isinstance(take, str) else dict(take)


@lru_cache(maxsize=64)
def entries(device: str, folder: Path) -> tuple[Entry, ...]:
    """Those of the device's table; () where there is none, or none that can be used."""
    path = folder / device_file(device)
    if not device or not path.is_file():
        return ()
    try:
        return read(path, device)
    except (OSError, ValueError) as error:
        warnings.warn(f"measured choices are not used: {error}", TableWarning, stacklevel=2)
        return ()


def read(path: Path, device: str | None = None) -> tuple[Entry, ...]:
    """The entries of a table's file, which must be ``device``'s.

    Raises ValueError, naming the file and what is wrong, for anything but a sound table.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        own = data.get("format") if isinstance(data, dict) else None
        raise ValueError(f"{path.name}: 'format' must be {FORMAT!r}, not {own!r}")
    if device is not None and data.get("device") != device:
        raise ValueError(
            f"{path.name} was measured on {data.get('device')!r}, this device is {device!r}"
        )
    found = data.get("entries")
    if not isinstance(found, list):
        raise ValueError(f"{path.name}: 'entries' must be a list")
    return tuple(_entry(f"{path.name}: entries[{i}]", item) for i, item in enumerate(found))


def as_data(entry: Entry) -> dict[str, Any]:
    """An entry as a table has it."""
    take: Any = entry.take if isinstance(entry.take, str) else dict(entry.take)
    own = {"operation": entry.operation, "what": entry.what, "dtype": entry.dtype}
    return {**own, **dict(zip(SIZES, entry.sizes, strict=True)), "take": take}


def table(device: str, measured: Mapping[str, Any], found: list[Entry]) -> dict[str, Any]:
    """A table as its file has it."""
    return {
        "format": FORMAT,
        "device": device,
        "measured": dict(measured),
        "entries": [as_data(entry) for entry in found],
    }


@cache
def device_file(device: str) -> str:
    """The file name of a device's table: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def _entry(where: str, item: Any) -> Entry:
    fields = ("operation", "what", "dtype", *SIZES, "take")
    if not isinstance(item, dict) or set(item) != set(fields):
        raise ValueError(f"{where} must be an object with exactly the keys {', '.join(fields)}")
    for key in ("operation", "what"):
        if not isinstance(item[key], str):
            raise ValueError(f"{where}: {key!r} must be a name, not {item[key]!r}")
    if item["dtype"] not in DTYPES:
        raise ValueError(f"{where}: 'dtype' is {item['dtype']!r}, not one of {', '.join(DTYPES)}")
    for key in SIZES:
        if type(item[key]) is not int or item[key] < 1:
            raise ValueError(f"{where}: {key!r} must be a positive integer, not {item[key]!r}")
    take = item["take"]
    if isinstance(take, dict) and all(type(value) is int for value in take.values()):
        take = tuple(take.items())
    elif not isinstance(take, str):
        raise ValueError(f"{where}: 'take' must be a name or a tile's numbers, not {take!r}")
    sizes = tuple(item[key] for key in SIZES)
    return Entry(item["operation"], item["what"], item["dtype"], sizes, take)
