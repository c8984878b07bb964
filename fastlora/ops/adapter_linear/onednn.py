"""The eager form with its float32 products run by oneDNN instead of MKL.

On processors that are not Intel's, MKL leaves AVX-512 unused: on an AMD EPYC (Zen 5, 2 cores,
torch 2.13) oneDNN runs a 256×576×576 product in 0.44 ms where MKL takes 0.91 ms. Without AVX-512
(Zen 3) MKL is as fast. The operator is the one torch.compile emits for CPU linears; it reads
transposed operands without a copy.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastlora.ops.adapter_linear import eager

# Below this many multiply-adds oneDNN's fixed cost (about 12 µs more a call) outweighs its speed;
# a narrow product (rank r on one side) gains only once its wide operand leaves the inner caches.
_MIN_PRODUCT = 1 << 21
_MIN_ROWS = 8
_NARROW = 64
_MIN_WIDE_OPERAND = 1 << 18

draw_seed, few_rows = eager.draw_seed, eager.few_rows


def linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [m, k] · b [n, k]ᵀ + bias [n], float32, on the CPU."""
    m, k = a.shape
    n = b.shape[0]
    if m < _MIN_ROWS or m * n * k < _MIN_PRODUCT:
        return eager.aten_linear(a, b, bias)
    if min(m, n, k) <= _NARROW and max(m, n) * k < _MIN_WIDE_OPERAND:
        return eager.aten_linear(a, b, bias)
    # a slice of a wider matrix as b takes oneDNN's reference code, 200 times as slow
    if b.stride() not in ((k, 1), (1, n)):
        return eager.aten_linear(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def onto(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [m, n] += a [m, k] · b [n, k]ᵀ, float32, on the CPU."""
    out.add_(linear(a, b))


forward = partial(eager.forward, linear=linear)
backward = partial(eager.backward, linear=linear)
scaled_forward = partial(eager.scaled_forward, linear=linear)
scaled_backward = partial(eager.scaled_backward, linear=linear)
