"""What the operation and its backends agree on, and which backends there are."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.ops import backend

_HERE = "fastlora.ops.adapter_linear"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Each module has ``draw_seed``, ``forward`` and ``backward`` with the signatures of eager.py.
BACKENDS = (
    backend.Backend(
        "triton",
        f"{_HERE}.triton",
        refuses=(
            backend.only_devices("cuda", "cpu"),
            backend.only_dtypes(*_FLOATS),
            backend.needs_triton,
        ),
        leaves=(backend.interpreter_is_for_tests,),
    ),
    backend.Backend(
        "onednn",
        f"{_HERE}.onednn",
        refuses=(
            backend.only_devices("cpu"),
            backend.only_dtypes(torch.float32),
            backend.needs_onednn,
        ),
        leaves=(backend.mkl_is_as_fast,),
    ),
    backend.Backend(
        "eager", f"{_HERE}.eager", refuses=(backend.only_dtypes(*_FLOATS, torch.float64),)
    ),
)


class Needs(NamedTuple):
    """Which gradients a backward call must produce; the rest come back as None."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool


def rows(x: Tensor) -> Tensor:
    """[..., K] → [M, K], the form every backend takes."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
