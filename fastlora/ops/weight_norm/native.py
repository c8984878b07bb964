"""The norms in one native call: W Aᵀ, the rows of B and, the first time, ‖W‖² in one pass over W."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastlora.ops.adapter_linear.native import linear
from fastlora.ops.library import address, core, with_rows
from fastlora.ops.weight_norm import eager
from fastlora.ops.weight_norm.contract import CANCELLATION, FLOOR

_core = core()

backward = partial(eager.backward, linear=linear)


def forward(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight_sq: Tensor | None,
    isa: str = "",
) -> tuple[Tensor, Tensor | None]:
    """As in eager.py, float32. ``isa``: one of the core's instruction sets, for tests."""
    n, k = weight.shape
    if 1 not in weight.stride():  # the eager form copies such a weight in pieces
        return eager.forward(weight, lora_A, lora_B, scaling, weight_sq, linear=linear)
    lora_A, lora_B = with_rows(lora_A), with_rows(lora_B)
    norm = torch.empty(n)
    lost = torch.empty(n, dtype=torch.uint8)
    sums = torch.empty(n, dtype=torch.float64) if weight_sq is None else weight_sq
    count = _core.row_norm(
        weight.data_ptr(), *weight.stride(), n, k, lora_A.shape[0],
        lora_A.data_ptr(), lora_A.stride(0), lora_B.data_ptr(), lora_B.stride(0),
        scaling, CANCELLATION, FLOOR, address(weight_sq), sums.data_ptr(),
        norm.data_ptr(), lost.data_ptr(), torch.get_num_threads(), isa,
    )  # fmt: skip
    if count:
        eager.recompute(norm, lost.nonzero().view(-1), weight, lora_A, lora_B, scaling)
    return norm, sums
