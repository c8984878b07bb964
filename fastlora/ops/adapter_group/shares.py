"""Which members of a group share a product with x: those that hold the very same lora_A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops.adapter_group.contract import Slot


class Shares(NamedTuple):
    """The distinct lora_A of a group, and who uses which."""

    slots: list[Slot]
    slot_of: list[int]  # of each member
    factors: list[float]  # what each member's scaling leaves to its lora_B


def share(
    lora_As: Sequence[Tensor],
    dtype: torch.dtype,
    trained: Sequence[bool],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    seeds: Sequence[Tensor | None],
) -> Shares:
    """A slot for every distinct lora_A, and one for every member with a seed: its mask is its own.

    Where the members of a slot have different scalings, its t carries none.
    """
    slots: list[Slot] = []
    slot_of: list[int] = []
    known: dict[Any, int] = {}
    for lora_A, trains, scaling, p, seed in zip(
        lora_As, trained, scalings, dropouts, seeds, strict=True
    ):
        key = None if seed is not None else _identity(lora_A, trains)
        slot = known.get(key) if key is not None else None
        if slot is None:
            slot = len(slots)
            slots.append(
                Slot(
                    lora_A.to(dtype), lora_A.shape[0], scaling, p if seed is not None else 0.0, seed
                )
            )
            if key is not None:
                known[key] = slot
        elif slots[slot].scaling != scaling:
            slots[slot] = slots[slot]._replace(scaling=1.0)
        slot_of.append(slot)
    factors = [
        1.0 if slots[slot].scaling == scaling else scaling / slots[slot].scaling
        for slot, scaling in zip(slot_of, scalings, strict=True)
    ]
    return Shares(slots, slot_of, factors)


def _identity(lora_A: Tensor, trains: bool) -> Any:
    """Equal for two lora_A whose products are the same, and whose gradients may be one.

    Two tensors over the same memory have gradients of their own, so one that trains is only itself.
    """
    if trains or type(lora_A) not in (Tensor, torch.nn.Parameter):
        return id(lora_A)
    return (lora_A.data_ptr(), lora_A.shape, lora_A.stride(), lora_A.dtype)
