"""The rows as a table, a summary, a file, and against an older file."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.device import DATASHEETS, Roof
from bench.measure import spread
from bench.throughput.run import Row, as_data, from_data, median
from fastlora.cli.errors import UserError

_MUST_AGREE = ("device", "threads", "driver", "versions", "commit")
FORMAT = 1  # of a results file; raised when its fields change their meaning


def roofs(measured: dict[str, Roof]) -> str:
    """The measured roofs, and what datasheets say of some cards."""
    lines = ["roofs                        copy GB/s     TFLOP/s"]
    for dtype, roof in measured.items():
        lines.append(_roof(f"this device, {dtype}", roof))
    lines += [_roof(f"{card}, half (datasheet)", roof) for card, roof in DATASHEETS.items()]
    return "\n".join(lines)


def _roof(title: str, roof: Roof) -> str:
    return f"{title:<28}{roof.bytes_per_s / 1e9:>10.1f}{roof.flops_per_s / 1e12:>12.2f}"


# --- table -------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """A block an operation, a line a cell and pass: milliseconds, and what follows from them."""
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(row.cell.op, []).append(row)
    return "\n\n".join(_block(op, own) for op, own in blocks.items())


def _block(op: str, rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in (*row.ms, *row.absent)))
    names = [name for name in names if any(name in row.ms for row in rows)]
    limit = _limit(names)
    ratio = f"{rows[0].rival}/ours [quartiles]"
    header = ["model", "layer", "M", "r", "p", "dtype", "pass", "floor", *names]
    header += ["× floor"] + ([f"× {limit}"] if limit else []) + [ratio]
    lines = [header]
    for row in rows:
        cell = row.cell
        tokens = str(cell.m) if cell.m else "–"
        line = [cell.model, cell.layer, tokens, str(cell.rank), f"{cell.dropout:g}"]
        line += [_short_dtype(cell.dtype), row.which, _ms(row.floor_ms)]
        line += [_entry(row, name) for name in names]
        ours = median(row, row.chosen)
        line.append(_over(ours, row.floor_ms))
        if limit:
            line.append(_over(ours, median(row, limit)))
        lines.append([*line, _speedup(row)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [f"{op}, milliseconds; * marks what is taken automatically"]
    for line in lines:
        cells = [value.ljust(width) for value, width in zip(line[:2], widths, strict=False)]
        cells += [value.rjust(width) for value, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def _limit(names: Sequence[str]) -> str | None:
    """The frozen layer ours are compared with: the one made by the faster library, where known."""
    for name in ("bare-onednn", "bare"):
        if name in names:
            return name
    return None


def _entry(row: Row, name: str) -> str:
    value = median(row, name)
    if value is None:
        return "wrong" if name in row.wrong else "–"
    return _ms(value) + ("*" if name == row.chosen else " ")


def _ms(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def _over(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else "–"


def _speedup(row: Row) -> str:
    found = row.speedups()
    if not found:
        return "–"
    low, middle, high = spread(found)
    return f"{middle:.2f} [{low:.2f}–{high:.2f}]"


def _short_dtype(dtype: str) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(dtype, dtype)


# --- what follows ------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    """Geometric means of the speed-ups, and every cell that is slower than the rival."""
    lines = []
    for op in dict.fromkeys(row.cell.op for row in rows):
        own = [row for row in rows if row.cell.op == op and row.speedups()]
        for which in dict.fromkeys(row.which for row in own):
            found = [spread(row.speedups()) for row in own if row.which == which]
            mean = statistics.geometric_mean([each.median for each in found])
            below = sum(each.median < 1 for each in found)
            lost = sum(each.high < 1 for each in found)
            lines.append(
                f"{op}, {which}: {mean:.2f} times {own[0].rival} (geometric mean of {len(found)}), "
                f"from {min(each.median for each in found):.2f} to "
                f"{max(each.median for each in found):.2f}; {below} below 1, {lost} of them "
                "beyond their spread (upper quartile below 1)"
            )
    for row in rows:
        if row.speedups() and spread(row.speedups()).high < 1:
            lines.append(f"slower: {row.cell.title} {row.which} {_speedup(row)}")
    return "\n".join(lines)


def remarks(rows: Sequence[Row], skipped: dict[str, str]) -> str:
    """Who has no number, and why; each reason once, with the number of cells."""
    found: dict[tuple[str, str], list[str]] = {}
    seen = set()
    for row in rows:
        if row.cell in seen:
            continue
        seen.add(row.cell)
        for name, reason in row.absent.items():
            found.setdefault((name, reason), []).append(row.cell.title)
    lines = [
        f"no number for {name}: {reason} ({cells[0] if len(cells) == 1 else f'{len(cells)} cells'})"
        for (name, reason), cells in found.items()
    ]
    return "\n".join([*lines, *(f"skipped {title}: {why}" for title, why in skipped.items())])


# --- files -------------------------------------------------------------------------------------


def write(
    path: Path,
    conditions: dict[str, Any],
    measured: dict[str, dict[str, float]],
    rows: Sequence[Row],
    skipped: dict[str, str],
) -> None:
    """Written beside and renamed."""
    result: dict[str, Any] = {
        "format": FORMAT,
        "conditions": conditions,
        "roofs": measured,
        "rows": [as_data(row) for row in rows],
        "skipped": skipped,
    }
    head = json.dumps({**result, "rows": []}, indent=1, ensure_ascii=False)
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    text = head.replace('"rows": []', f'"rows": [\n  {lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(conditions, rows) of a results file; UserError where there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    own = data.get("format") if isinstance(data, dict) else None
    if own != FORMAT:
        said = f"of format {own}" if own is not None else "no results of this bench"
        raise UserError(f"{path} is {said}; this version reads format {FORMAT}")
    try:
        return data["conditions"], [from_data(row) for row in data["rows"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None


def kept(path: Path, conditions: dict[str, Any]) -> list[Row]:
    """The rows of an existing file that may stay: those under the very same conditions."""
    try:
        before, old = read(path)
    except UserError:
        return []
    return old if all(before.get(name) == conditions[name] for name in _MUST_AGREE) else []


def others(old: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Those of ``old`` that are of other cells or passes than ``rows``."""
    new = {(row.cell, row.which) for row in rows}
    return [row for row in old if (row.cell, row.which) not in new]


def compare(
    conditions: dict[str, Any], rows: Sequence[Row], old: tuple[dict[str, Any], list[Row]]
) -> str:
    """What has changed for ours since an older file, in time and in the ratio to the rival."""
    before, old_rows = old
    lines = [f"against commit {before.get('commit')} on {before.get('device')}"]
    for name in ("device", "threads", "driver"):
        if before.get(name) != conditions.get(name):
            lines.append(f"  other {name}: {before.get(name)}, now {conditions.get(name)}")
    for name, version in conditions.get("versions", {}).items():
        was = before.get("versions", {}).get(name)
        if was != version and name in ("torch", "triton", "peft", "fastlora"):
            lines.append(f"  other {name}: {was}, now {version}")
    known = {(row.cell, row.which): row for row in old_rows}
    changed, same = [], 0
    shared = [row for row in rows if (row.cell, row.which) in known]
    for row in shared:
        was = known[row.cell, row.which]
        if row.chosen not in row.ms or was.chosen not in was.ms:
            if (row.chosen in row.ms) != (was.chosen in was.ms):
                now = "has a number now" if row.chosen in row.ms else "has none any more"
                changed.append((0.0, f"  {row.cell.title} {row.which}: ours {now}"))
            continue
        own, theirs = spread(row.ms[row.chosen]), spread(was.ms[was.chosen])
        if own.low <= theirs.high and theirs.low <= own.high:
            same += 1
            continue
        ratio = own.median / theirs.median
        changed.append(
            (
                ratio,
                f"  {row.cell.title} {row.which}: {_ms(theirs.median)} → {_ms(own.median)} ms "
                f"({ratio:.2f}), {row.rival}/ours {_speedup(was)} → {_speedup(row)}",
            )
        )
    lines += [text for _, text in sorted(changed, reverse=True)]
    lines.append(
        f"  {len(changed)} of {len(shared)} shared rows changed beyond their quartiles, {same} did "
        f"not; {len(rows) - len(shared)} are new, {len(old_rows) - len(shared)} are gone"
    )
    return "\n".join(lines)
