"""Casts that cost nothing where there is nothing to cast: a call into torch takes a microsecond."""

from __future__ import annotations

import torch
from torch import Tensor


def to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without a call into torch where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
