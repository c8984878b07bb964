"""The eager form with its float32 products run by oneDNN instead of MKL."""

from __future__ import annotations

from functools import partial

from fastlora.ops.adapter_group import eager
from fastlora.ops.adapter_linear.eager import InPlace
from fastlora.ops.adapter_linear.onednn import linear, onto

draw_seed = eager.draw_seed


forward = partial(eager.forward, linear=linear)
backward = partial(eager.backward, linear=linear, gradient=partial(InPlace, onto=onto))
