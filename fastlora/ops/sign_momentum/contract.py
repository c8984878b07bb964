"""What the operation and its backends agree on: one primitive, its random bits, its backends.

For every tensor of the list, with g the gradient, m the momentum and θ the parameter:

    u  = sign(a·m + b·g)
    m' = c·m + d·g
    θ' = w·θ − η·u          w = 1 − ηλ

Every product, sum and difference is rounded by itself (no fused multiply-add), in float32, or in
float64 for float64 parameters; a, b, c, d, η and w are rounded to it first, w after it has been
computed in float64. So backends agree bit for bit. sign(0) is 0, and as torch's sign(NaN) is 0.

With relative learning rates η = lr·max(r, floor): r, the root of the mean square, is computed in
float64 and rounded to float32, the product is made in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.sign_momentum.eight_bit import EightBit

Momentum = Tensor | EightBit
Number = float | Tensor  # a tensor: 0-dim, on the parameters' device

# Each module has ``read(job, kept, checked)``, the lists as it takes them, made from an earlier
# call's if they were the same: None where they still have to be checked, or are not row-major. And
# ``update(job, table)``, which does all that a Job asks for.
BACKENDS = (
    _backend.Backend(
        "triton",
        "fastlora.ops.sign_momentum.triton",
        refuses=(
            _backend.only_devices("cuda", "cpu"),
            _backend.only_dtypes(*_backend.FLOATS),
            _backend.needs_triton,
        ),
        leaves=(_backend.interpreter_is_for_tests,),
    ),
    _backend.Backend(
        "native",
        "fastlora.ops.sign_momentum.native",
        refuses=(
            _backend.only_devices("cpu"),
            _backend.only_dtypes(*_backend.FLOATS),
            _backend.needs_native,
        ),
    ),
    _backend.Backend("eager", "fastlora.ops.sign_momentum.eager"),
)


@dataclass(eq=False)
class Job:
    """A checked call. Lists have one entry per tensor; an absent part is None.

    Without ``params`` only momentum moves, without ``grads`` only parameters do (u = sign(m)); with
    ``shrink``, params may be there for that alone, and ``moves`` is False.
    """

    params: Sequence[Tensor] | None
    grads: Sequence[Tensor] | None
    momenta: Sequence[Momentum]
    a: float
    b: float
    c: float
    d: float
    lr: Sequence[Number]
    weight_decay: Sequence[Number]
    floor: Sequence[Number]
    relative: Sequence[str | None] | None  # each None, "tensor" or "rows"
    rows: Sequence[Tensor | None] | None  # each a bool mask [rows] of what moves
    mask_momentum: bool  # whether rows holds for momentum too
    shrink: float | None
    centers: Sequence[float] | None
    skip: Tensor | None  # bool [tensors]: parameters that stay
    moves: bool  # whether parameters are updated, and not only shrunk
    seed: int | None  # of stochastic rounding; None rounds to nearest


def compute_dtype(param: Tensor | None) -> torch.dtype:
    """What a tensor's update is computed in."""
    return torch.float64 if param is not None and param.dtype == torch.float64 else torch.float32


# --- random bits of stochastic rounding ----------------------------------------------------------

_MASK = (1 << 64) - 1


def keys(seed: int, index: int) -> tuple[int, int]:
    """Two 32-bit keys for tensor ``index`` of a list: splitmix64 of both numbers.

    Element i, counted in row-major order, draws the low 16 bits of h:

        h = i + k₀;  h ^= h >> 16;  h *= 0x85ebca6b;  h ^= h >> 13;  h ^= k₁;
        h *= 0xc2b2ae35;  h ^= h >> 16                                        (mod 2³²)
    """
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z & 0xFFFFFFFF, z >> 32
