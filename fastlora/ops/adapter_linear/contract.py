"""What the operation and its backends agree on."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """Which gradients a backward call must produce; the rest come back as None."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool
