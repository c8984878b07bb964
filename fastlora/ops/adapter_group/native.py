"""The eager form over PyTorch's faster products and ``adapter_linear``'s native steps."""

from __future__ import annotations

from functools import partial

from fastlora.ops import backend
from fastlora.ops.adapter_group import eager, onednn
from fastlora.ops.adapter_linear.native import draw, draw_seed, linear, output_pass, update

__all__ = ["backward", "draw_seed", "forward"]

_onto = onednn.onto if backend.multiplies_with_onednn() else eager.aten_onto

forward = partial(eager.forward, linear=linear, update=update, draw=draw)
backward = partial(
    eager.backward, linear=linear, onto=_onto, update=update, output_pass=output_pass, draw=draw
)
