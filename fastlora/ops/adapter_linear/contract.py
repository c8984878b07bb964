"""What the operation and its backends agree on, and which backends there are."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.ops import backend

# Each module has ``draw_seed``, ``forward`` and ``backward`` with the signatures of eager.py, and
# ``scaled_forward`` and ``scaled_backward`` for calls with an ``out_scale``; all but triton.py have
# ``few_rows`` besides (``entry.has_few_rows``), native.py ``takes_few`` and ``takes_layer``. The
# other two vectors never reach a backend: scaled.py folds them into lora_B. Nor does
# ``keep_output``: a backend sees whether it is given the y to read from.
BACKENDS = backend.usual("fastlora.ops.adapter_linear")


class Needs(NamedTuple):
    """Which gradients a backward call must produce; the rest come back as None."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool


class Scales(NamedTuple):
    """The vectors of y = g ∘ (x Wᵀ + s · b ∘ (((drop(x) Aᵀ) ∘ d) Bᵀ)) + bias; None for ones."""

    out: Tensor | None  # g [N]
    mid: Tensor | None  # d [r]
    adapter: Tensor | None  # b [N]


def doubtful(
    out_scale: Tensor, bias: Tensor | None, mean_square: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """bool [N]: columns whose z = (y − bias) / g cannot be read off a y of ``dtype``.

    Those are where g is zero, not finite, or so small or large that g ∘ z may leave ``dtype``'s
    range; and those whose bias is so much larger than g ∘ z that it hides it where y is rounded.
    mean_square [N], given with a bias, is that of y − bias over the rows. README.md derives the
    bounds.
    """
    least, most, hidden = legible(dtype)
    size = out_scale.abs().to(torch.promote_types(dtype, torch.float32))
    sound = (size >= least) & (size <= most)
    if bias is not None:
        assert mean_square is not None
        sound &= bias.abs() <= mean_square.sqrt() * hidden
    return ~sound


def legible(dtype: torch.dtype) -> tuple[float, float, float]:
    """The bounds of ``doubtful``: |g| is at least, and at most; |bias| over the root of
    mean_square is at most."""
    reach = 2.0**8 if dtype == torch.float16 else 2.0**60
    return 1 / reach, reach, 2.0 if dtype in backend.HALF else 64.0


def check_mask(seed: Tensor | None, dim: int | None) -> None:
    """Raise RuntimeError unless backward's seed is of the kind its forward drew.

    A Philox seed is [1], a stream seed []: a checkpoint recomputed on another backend would
    otherwise mix two masks.
    """
    if seed is not None and seed.dim() != dim:
        raise RuntimeError(
            "a checkpoint was recomputed on another backend than its forward, with another "
            "dropout mask; choose the backend for the whole process with FASTLORA_BACKEND"
        )


def rows(x: Tensor) -> Tensor:
    """[..., K] → [M, K], the form every backend takes."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
