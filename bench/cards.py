"""Facts about NVIDIA cards that need not be here: what predictions without a GPU are made from.

From NVIDIA's architecture whitepapers (A100, H100, Ada) and datasheets; rates are those of
``bench.device.DATASHEETS``. The L2 of an A100, H100 or H200 has two halves, each of which caches
what its own multiprocessors read, so that data which all read is there twice: half of it counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench import names
from bench.device import DATASHEETS, Roof
from fastlora.ops.adapter_linear import tiles

_MIB = 1 << 20


@dataclass(frozen=True)
class Card:
    """One card. ``l2_bytes`` is what data read by all multiprocessors finds of the L2 cache."""

    title: str
    device: str  # as torch names it
    capability: int
    sm_count: int
    l2_bytes: int
    roof: Roof  # bytes a second; dense half-precision flops a second with fp32 accumulation

    @property
    def arch(self) -> tiles.Arch:
        """What tiles are chosen from."""
        return tiles.arch_of(self.capability, self.sm_count, self.device)


def _card(
    sheet: str, device: str, capability: int, sm_count: int, l2_mib: int, halves: int
) -> Card:
    cache = l2_mib * _MIB // halves
    return Card(sheet, device, capability, sm_count, cache, DATASHEETS[sheet])


CARDS = {
    "a100": _card("A100 80GB", "NVIDIA A100-SXM4-80GB", 80, 108, 40, 2),
    "rtx-4090": _card("RTX 4090", "NVIDIA GeForce RTX 4090", 89, 128, 72, 1),
    "h100": _card("H100 SXM", "NVIDIA H100 80GB HBM3", 90, 132, 50, 2),
    "h200": _card("H200", "NVIDIA H200", 90, 132, 50, 2),
}


def find(name: str) -> Card:
    """The card of that name, short or as torch gives it. Raises names.UnknownName."""
    by_device = {card.device: key for key, card in CARDS.items()}
    if name in by_device:
        return CARDS[by_device[name]]
    return CARDS[names.check("card", name, CARDS)]
