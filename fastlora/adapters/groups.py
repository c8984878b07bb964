"""Which adapted layers of a model read one input, and are therefore computed together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

# Names under which models keep the linears that read one input, side by side in one parent. A name
# only proposes: a layer that is called with another tensor leaves its group (nn.group).
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
# Of these the model multiplies one output, activated, with the other, and so keeps both.
GATED = (
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
    ("fc11", "fc12"),
)
FAMILIES = _ATTENTION + GATED

Layer = TypeVar("Layer", bound=nn.Module)


def find_groups(layers: Mapping[str, Layer]) -> list[dict[str, Layer]]:
    """Those of these layers (by path) that stand in one family, and take inputs of one width:
    {path: layer}, two or more each."""
    by_parent: dict[str, dict[str, str]] = {}
    for path in layers:
        parent, _, name = path.rpartition(".")
        by_parent.setdefault(parent, {})[name] = path
    groups = []
    for names in by_parent.values():
        for family in FAMILIES:
            by_width: dict[Any, dict[str, Layer]] = {}
            for path in (names[name] for name in family if name in names):
                width = getattr(layers[path], "in_features", None)
                by_width.setdefault(width, {})[path] = layers[path]
            for group in by_width.values():
                if len({id(layer) for layer in group.values()}) == len(group) > 1:
                    groups.append(group)
    return groups


def is_kept(path: str) -> bool:
    """Whether the model keeps the output of the layer at ``path``, by its name: for the product of
    a gate, or as the values of its attention. Queries and keys are mostly rotated first."""
    name = path.rpartition(".")[2]
    return any(name in pair for pair in GATED) or any(name == values for _, _, values in _ATTENTION)


def partners(path: str, group: Iterable[str]) -> str:
    """What a report says of the layer at ``path``: the names it is computed with."""
    others = [other.rpartition(".")[2] for other in group if other != path]
    return f"computed with {' and '.join(others)}"
