"""What the operation and its backends agree on, and which backends there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastlora.ops import backend

# Each module has ``draw_seed``, ``forward`` and ``backward`` with the signatures of eager.py.
BACKENDS = backend.usual("fastlora.ops.adapter_group")


class Member(NamedTuple):
    """One layer of a group: what it brings besides x, as ``adapter_linear`` takes it."""

    weight: Tensor  # [N, K]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scaling: float
    bias: Tensor | None = None  # [N]
    dropout_p: float = 0.0
    out_scale: Tensor | None = None  # g [N]
    mid_scale: Tensor | None = None  # d [r]
    adapter_scale: Tensor | None = None  # b [N]
    drop_base: bool = False
    keep_output: bool = True


class Slot(NamedTuple):
    """One lora_A and what x is multiplied with it for: t = scaling · drop(x) Aᵀ [M, r].

    Members without dropout that hold the very same lora_A share a slot. In x's dtype. A slot that
    drops has a seed.
    """

    lora_A: Tensor | None  # [r, K]; None in backward where no gradient asked for needs it
    rank: int
    scaling: float
    dropout_p: float = 0.0
    seed: Tensor | None = None


class Part(NamedTuple):
    """The rest of a member, y = g ∘ (x Wᵀ + t Cᵀ) + bias, where t is its slot's.

    C [N, r] is lora_B with adapter_scale and mid_scale folded in. In x's dtype, but g may be
    float32. In backward, what no gradient asked for needs is None; ``y`` comes where g's is
    asked for and the member keeps its output.
    """

    slot: int
    weight: Tensor | None  # [N, K]
    lora_B: Tensor | None  # C [N, r]
    bias: Tensor | None  # [N]
    out_scale: Tensor | None  # g [N]
    y: Tensor | None = None  # [M, N]


class Needs(NamedTuple):
    """Which gradients of one part a backward call must produce."""

    weight: bool
    lora_B: bool
    bias: bool
    out_scale: bool


class Gradients(NamedTuple):
    """Those of one part, None where not asked for; in dy's dtype or in float32."""

    weight: Tensor | None = None
    lora_B: Tensor | None = None  # of C
    bias: Tensor | None = None
    out_scale: Tensor | None = None


def together(slots: Sequence[Slot], wanted: Sequence[bool], first: Sequence[bool]) -> list[int]:
    """The slots without dropout among the ``wanted``, those that are ``first`` before the others.

    Their lora_A are multiplied as one [Σ r, K] matrix.
    """
    found = [i for i, slot in enumerate(slots) if wanted[i] and slot.seed is None]
    return sorted(found, key=lambda i: not first[i])


def common_scaling(slots: Sequence[Slot]) -> float | None:
    """The scaling of all of them, None where they differ."""
    scalings = {slot.scaling for slot in slots}
    return scalings.pop() if len(scalings) == 1 else None
