"""The norms in one native call: one pass over W gives W Aᵀ and, the first time, ‖W‖².

With a cache, the same call sees whether anything has changed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlora.ops.adapter_linear.native import linear
from fastlora.ops.library import address, core, with_rows
from fastlora.ops.weight_norm import eager
from fastlora.ops.weight_norm.cache import WeightNormCache
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
    norm = weight.new_empty(n)
    lost = weight.new_empty(n, dtype=torch.uint8)
    sums = weight.new_empty(n, dtype=torch.float64) if weight_sq is None else weight_sq
    count = _core.row_norm(
        address(weight), *weight.stride(), n, k, lora_A.shape[0],
        address(lora_A), lora_A.stride(0), address(lora_B), lora_B.stride(0),
        scaling, CANCELLATION, FLOOR, norm.data_ptr(), address(weight_sq), sums.data_ptr(),
        lost.data_ptr(), torch.get_num_threads(), isa,
    )  # fmt: skip
    if count:
        eager.recompute(norm, lost.nonzero().view(-1), weight, lora_A, lora_B, scaling)
    return norm, sums


def remembered(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    cache: WeightNormCache,
    isa: str = "",
) -> Tensor | None:
    """n [N], the one remembered where nothing has changed; None for what the core's memory does
    not serve, which is for ``forward`` and ``cache.find``."""
    plain = all(type(tensor) in (Tensor, Parameter) for tensor in (weight, lora_A, lora_B))
    if cache.trust_versions or not plain or weight.numel() == 0:
        return None
    (row, column), (a_row, a_column), (b_row, b_column) = (
        weight.stride(), lora_A.stride(), lora_B.stride(),
    )  # fmt: skip
    if not (row == 1 or column == 1) or a_column != 1 or b_column != 1 or weight.is_inference():
        return None
    n, k = weight.shape
    memory = cache.memory(weight, _core.NormMemory)
    while True:
        norm = weight.new_empty(n)
        found = memory.update(
            address(weight), row, column, n, k, lora_A.shape[0],
            address(lora_A), a_row, address(lora_B), b_row,
            scaling, CANCELLATION, FLOOR, norm.data_ptr(), weight._version, norm,
            torch.get_num_threads(), isa,
        )  # fmt: skip
        if found is None:  # another thread is computing
            return None
        norm, version, lost = found
        if lost:
            rows = torch.tensor(lost, device="cpu")
            eager.recompute(norm, rows, weight.detach(), lora_A.detach(), lora_B.detach(), scaling)
            memory.keep(norm, norm._version)
            return norm
        if norm._version == version:
            return norm
        memory.forget()  # somebody has written into it
