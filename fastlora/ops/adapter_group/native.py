"""The eager form over PyTorch's faster products and ``adapter_linear``'s native steps."""

from __future__ import annotations

from functools import partial

from fastlora.ops.adapter_group import eager
from fastlora.ops.adapter_linear.native import (
    BACKWARD,
    FORWARD,
    draw_seed,
    takes_few,
    takes_layer,
)

__all__ = ["backward", "draw_seed", "forward", "takes_few", "takes_layer"]

forward = partial(eager.forward, **FORWARD)
backward = partial(eager.backward, **BACKWARD)
