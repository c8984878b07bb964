"""The rows as a picture: how near to the roof, and how much faster than the rival."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.device import DATASHEETS, Roof
from bench.measure import spread
from bench.throughput.run import BOTH, Row, median

_INK, _MUTED = "#22262b", "#6b737c"
_COLOURS = {"rival": "#f2b179", "bare": "#9aa3ad", "ours": "#1f5fbf"}
_BARS = 40  # at most


def draw(
    path: Path, conditions: dict[str, Any], measured: dict[str, Roof], rows: Sequence[Row]
) -> None:
    """Left a bar for the whole passes of an operation, right the roofline of the commonest dtype.

    As wide as a README shows it, for letters that can be read there.
    """
    from matplotlib.figure import Figure

    bars = _evenly(grouped(rows), _BARS)
    height = max(4.6, 1.8 + 0.19 * len(bars))
    figure = Figure(figsize=(9, height), dpi=180, facecolor="white")
    right, left = figure.subplots(1, 2)
    dtypes = [row.cell.dtype for row in rows]
    dtype = max(set(dtypes), key=dtypes.count)
    own = [row for row in rows if row.which != BOTH and row.cell.dtype == dtype]
    _roofline(left, measured[dtype], own, dtype, on_gpu=rows[0].cell.device != "cpu")
    _speedups(right, bars)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c9ced4")
        axes.tick_params(colors=_MUTED, labelsize=8)
    figure.text(
        0.012, 0.012, "\n".join(textwrap.wrap(caption(conditions), 150)), fontsize=7, color=_MUTED,
        va="bottom",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.6 / height, 1, 1), w_pad=1.5)
    beside = path.with_name("." + path.name)
    figure.savefig(beside, format="png")
    os.replace(beside, path)


def caption(conditions: dict[str, Any]) -> str:
    """Under which conditions the figures hold."""
    versions = conditions["versions"]
    said = [str(conditions["device"])]
    if conditions["driver"]:
        said.append(f"driver {conditions['driver']}")
    if conditions["threads"] and not conditions["driver"]:
        said.append(f"{conditions['threads']} threads")
    packages = [f"{name} {versions[name]}" for name in ("torch", "peft") if name in versions]
    return (
        f"{', '.join(said)}; {', '.join(packages)}; commit {conditions['commit']}. All take turns "
        "in one process, each call on operands that are not in the cache; medians and quartiles. "
        "Values and gradients are checked against float64 first."
    )


def _roofline(axes: Any, roof: Roof, rows: Sequence[Row], dtype: str, on_gpu: bool) -> None:
    lowest = min((row.flops / row.moved for row in rows), default=1.0) / 2
    highest = max((row.flops / row.moved for row in rows), default=100.0) * 2
    edge = roof.flops_per_s / roof.bytes_per_s
    points = sorted({lowest, min(max(edge, lowest), highest), highest})
    axes.plot(
        points, [min(roof.flops_per_s, p * roof.bytes_per_s) / 1e9 for p in points], color=_INK,
        lw=1.4, label="measured copy bandwidth and product rate",
    )  # fmt: skip
    if on_gpu:
        for card, sheet in DATASHEETS.items():
            ys = [min(sheet.flops_per_s, p * sheet.bytes_per_s) / 1e9 for p in points]
            axes.plot(points, ys, color="#d5dade", lw=0.9)
            axes.annotate(card, (points[-1], ys[-1]), fontsize=6, color=_MUTED, ha="right")
    groups: dict[str, list[tuple[float, float]]] = {"bare": [], "rival": [], "ours": []}
    for row in rows:
        for kind, name in (("bare", "bare"), ("rival", row.rival), ("ours", row.chosen)):
            ms = median(row, name)
            if ms:
                groups[kind].append((row.flops / row.moved, row.flops / ms / 1e6))
    labels = {"bare": "frozen layer alone", "rival": "rival (peft, or torch)", "ours": "fastlora"}
    for kind, found in groups.items():
        if found:
            axes.scatter(
                *zip(*found, strict=True), s=13, color=_COLOURS[kind], label=labels[kind],
                alpha=0.8, lw=0,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte that must move", color=_MUTED, fontsize=9)
    axes.set_title(f"GFLOP/s, {dtype}, forward and backward", loc="left", fontsize=9.5, color=_INK)
    axes.grid(color="#eceff2")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, labelcolor=_INK, loc="lower right", edgecolor="none")


def _speedups(axes: Any, groups: Sequence[Group]) -> None:
    names = []
    for place, group in enumerate(groups):
        names.append(group.name)
        middles = [spread(row.speedups()).median for row in group.rows]
        mean = statistics.geometric_mean(middles)
        axes.barh(place, mean - 1.0, left=1.0, height=0.7, color=_COLOURS["ours"])
        for row, middle in zip(group.rows, middles, strict=True):
            low, _, high = spread(row.speedups())
            axes.plot([low, high], [place, place], color=_INK, lw=0.8, alpha=0.35)
            axes.plot([middle], [place], "o", ms=2.6, color=_INK, mew=0)
    axes.axvline(1.0, color=_INK, lw=1, ls=(0, (4, 3)))
    axes.set_yticks(range(len(groups)), names)
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xscale("log")  # twice as fast and half as fast are equally far from the rival
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 1.25))
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= tick <= high]
    axes.set_xticks(ticks or [1], [f"{tick:g}" for tick in ticks or [1]])
    axes.minorticks_off()
    title = "times as fast as peft (svd: torch),\nforward + backward; a dot a layer"
    axes.set_title(title, loc="left", fontsize=9.5, color=_INK)


class Group(NamedTuple):
    """The rows of one bar: an operation at one model, M, rank and dropout."""

    name: str
    rows: list[Row]


def grouped(rows: Sequence[Row]) -> list[Group]:
    """Whole passes with a speed-up, all layers of a bar together, in the order of the rows."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.which not in ("forward", "backward") and row.speedups():
            cell = row.cell
            key = (cell.op, cell.model, cell.m, cell.rank, cell.dropout, cell.dtype)
            found.setdefault(key, []).append(row)
    ranks = {key[3] for key in found if key[3]}
    groups = []
    for (op, model, m, rank, dropout, _), own in found.items():
        said = [op.removeprefix("adapter_"), model]
        said += [f"M={m}"] if m else []
        said += [f"r={rank}"] if rank and len(ranks) > 1 else []
        said += [f"p={dropout:g}"] if dropout else []
        groups.append(Group(" ".join(said), own))
    return groups


def _evenly(groups: Sequence[Group], most: int) -> list[Group]:
    if len(groups) <= most:
        return list(groups)
    return [groups[i * len(groups) // most] for i in range(most)]
