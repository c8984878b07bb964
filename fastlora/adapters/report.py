"""What a call over a whole model did and did not do, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    """A module's path and what is to be said of it."""

    name: str
    detail: str


@dataclass
class Report:
    """``fused``: the layers that now run fastlora's operation. ``skipped``: those that do not,
    each with its reason."""

    fused: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} layers fused, {len(self.skipped)} left as they were"]
        for title, rows in (("fused", self.fused), ("left", self.skipped)):
            groups = Counter((_pattern(row.name), row.detail) for row in rows)
            for (pattern, detail), count in groups.items():
                times = f" ({count}×)" if count > 1 else ""
                lines.append(f"  {title}: {pattern}{times}: {detail}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, list[dict[str, str]]]:
        return {
            "fused": [row._asdict() for row in self.fused],
            "skipped": [row._asdict() for row in self.skipped],
        }


def _pattern(name: str) -> str:
    """model.layers.12.self_attn.q_proj → model.layers.*.self_attn.q_proj."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
