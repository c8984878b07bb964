from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Member(NamedTuple):
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None = None
    dropout_p: float = 0.0
    out_scale: Tensor | None = None
    mid_scale: Tensor | None = None
    adapter_scale: Tensor | None = None
    drop_base: bool = False
