"""Singular values and vectors of products B·A. Stands in for ``fastlora.ops.svd_product``, which
is to replace this file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ProductSVD(NamedTuple):
    """B A = U diag(S) Vh: U [..., N, k], S [..., k] descending, Vh [..., k, K], k ≤ r."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def svd_product(B: Tensor, A: Tensor) -> ProductSVD:
    """Of B [..., N, r] and A [..., r, K], from the QR of both; BA is not formed."""
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return ProductSVD(left @ U, S, Vh @ right.mT)
