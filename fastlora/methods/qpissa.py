"""QPiSSA (arXiv 2404.02948): PiSSA whose residual is quantised, and its error taken up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.starts import principal
from fastlora.nn.adapted import check_rank


class QPiSSA(NamedTuple):
    """W ≈ ``weight`` + s·BA.

    ``errors``: ‖W − weight − s·BA‖_F after each round, the last one that of what is returned;
    before them, that of quantising W itself.
    """

    weight: Tensor  # [N, K], dequantised
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    errors: list[float]


@torch.no_grad()
def qpissa(
    weight: Tensor,
    r: int,
    scaling: float,
    quantise: Callable[[Tensor], Tensor],
    n_iter: int = 5,
    niter: int | None = None,
) -> QPiSSA:
    """A quantised weight and the adapter that goes with it, by alternating between the two.

    E ← W; ``n_iter`` times: s·BA ← the best approximation of rank r of E, W_q ← quantise(W − sBA),
    E ← W − W_q. The adapter is that of the last round. One round is PiSSA and then quantisation.

    Args:
        weight: [N, K], floating.
        quantise: from a weight [N, K] in float32 (float64 for a float64 weight) to the nearest that
            the quantiser has, dequantised, in the same shape. Any quantiser will do, such as a
            round trip through bitsandbytes' NF4; quantise the result once more to get its codes.
        n_iter: the official runs take 1 or 5.
        niter: of ``ops.svd_lowrank``; None decomposes wholly.

    Raises ValueError for a weight that is no finite matrix of r singular values, a scaling that is
    not above 0, no rounds, and a quantiser that returns another shape or what is not finite.
    """
    check_rank("r", r)
    check_rank("n_iter", n_iter)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"the weight must be a floating matrix, not {weight.dtype} {list(weight.shape)}"
        )
    if r > min(weight.shape):
        raise ValueError(f"r is {r}, and a weight {list(weight.shape)} has no such rank")
    if not scaling > 0:
        raise ValueError(f"scaling must be above 0, not {scaling!r}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinity in it")
    whole = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))

    def quantised(matrix: Tensor) -> Tensor:
        result = quantise(matrix.clone())
        if result.shape != matrix.shape:
            raise ValueError(f"quantise made {list(result.shape)} of {list(matrix.shape)}")
        if not torch.isfinite(result).all():
            raise ValueError("quantise made NaN or infinity")
        return result.to(matrix)

    rest = whole
    errors = [float(torch.linalg.matrix_norm(whole - quantised(whole)))]
    for _ in range(n_iter):
        ((B, A),) = principal([rest], r, scaling, niter)
        target = torch.addmm(whole, B, A, alpha=-scaling)
        base = quantised(target)
        rest = whole - base
        errors.append(float(torch.linalg.matrix_norm(target - base)))
    return QPiSSA(base, A, B, errors)
