"""The eager form over PyTorch's faster products and ``adapter_linear``'s native steps."""

from __future__ import annotations

from functools import partial

from fastlora.ops.adapter_group import eager
from fastlora.ops.adapter_linear.native import (
    Gathered,
    draw,
    draw_seed,
    linear,
    output,
    output_pass,
    update,
)

__all__ = ["backward", "draw_seed", "forward"]

forward = partial(eager.forward, linear=linear, update=update, output=output, draw=draw)
backward = partial(
    eager.backward,
    linear=linear,
    update=update,
    output_pass=output_pass,
    gradient=Gathered,
    draw=draw,
)
