"""What is known of a residual weight without reading it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from fastlora.adapters import starts
from fastlora.adapters.starts import Taken
from fastlora.nn import LoRALinear

MOST = torch.finfo(torch.float16).max


def taken(weight: float, product: float, dtype: torch.dtype, known: bool = True) -> Taken:
    """A layer whose weight is ``weight`` throughout, and factors with sBA = ``product``."""
    linear = nn.Linear(4, 3, bias=False).to(dtype)
    nn.init.constant_(linear.weight, weight)
    layer = LoRALinear.from_linear(linear, r=2, lora_alpha=2)
    A, B = torch.ones(2, 4), torch.full((3, 2), product / 2)
    return Taken("layer", layer, A, B, weight_is_finite=known)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_usual_factors_are_known_to_leave_finite_weights(dtype: torch.dtype) -> None:
    one = taken(0.5, 0.25, dtype)
    with mock.patch.object(starts, "_is_finite", side_effect=AssertionError("read")):
        assert one.leaves_finite(one.residual())


@pytest.mark.parametrize(
    ("weight", "product", "known"),
    [
        (MOST, -7.9, True),  # the largest that is not read: half a last place is 16
        (MOST, -20.0, True),
        (-MOST, 20.0, True),
        (MOST, 20.0, True),
        (1.0, float("nan"), True),
        (1.0, float("inf"), True),
        (float("nan"), 0.1, False),
        (float("inf"), 0.1, False),
        (1.0, 0.1, False),
    ],
)
def test_what_is_not_known_is_read(weight: float, product: float, known: bool) -> None:
    one = taken(weight, product, torch.float16, known)
    residual = one.residual()
    assert one.leaves_finite(residual) == bool(torch.isfinite(residual).all())
