"""``svd_product``: the exact SVD of B·A from its factors, the product never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from fastlora.ops.low_rank_svd.contract import (
    check_list,
    check_matrix,
    exponents,
    result_dtype,
    scaled,
    without_autocast,
)
from fastlora.ops.low_rank_svd.eager import factored


class ProductSVD(NamedTuple):
    """B·A = U diag(S) Vh."""

    U: Tensor
    S: Tensor
    Vh: Tensor


@overload
def svd_product(lora_B: Tensor, lora_A: Tensor) -> ProductSVD: ...
@overload
def svd_product(lora_B: Sequence[Tensor], lora_A: Sequence[Tensor]) -> list[ProductSVD]: ...
def svd_product(
    lora_B: Tensor | Sequence[Tensor], lora_A: Tensor | Sequence[Tensor]
) -> ProductSVD | list[ProductSVD]:
    """The SVD of every product B·A, from an orthonormal basis of each factor and an r × r core.

    Args:
        lora_B, lora_A: stacks [..., N, r] and [..., r, K] with equal leading dimensions, or two
            lists of as many matrices of any shapes; pairs of one shape and dtype are decomposed
            together. Factors may be rank-deficient or zero.

    Returns:
        ProductSVD(U [..., N, p], S [..., p] descending, Vh [..., p, K]) with p = min(N, r, K), for
        lists a list of them. Computed in float64 throughout (the factors are small); returned in
        float64 for float64 factors and in float32 for all others. U and Vh are orthonormal also
        where S is zero. Nothing is differentiable: it runs under ``torch.no_grad``.

    Raises:
        ValueError: shapes that do not fit, lists that are empty or of different lengths, NaN or
            infinity, factors on several devices.
        TypeError: complex or integer factors, or two factors of different dtypes.
    """
    if isinstance(lora_B, Tensor) and isinstance(lora_A, Tensor):
        _check_pair("lora_B", lora_B, "lora_A", lora_A)
        b, a = (t.reshape(-1, *t.shape[-2:]) for t in (lora_B, lora_A))
        whole = _same_shape(b, a, [""] * len(b))
        return ProductSVD(*(t.view((*lora_B.shape[:-2], *t.shape[1:])) for t in whole))
    if isinstance(lora_B, Tensor) or isinstance(lora_A, Tensor):
        raise TypeError("lora_B and lora_A must both be tensors or both be lists")
    bs, as_ = check_list("lora_B", lora_B), check_list("lora_A", lora_A)
    if len(bs) != len(as_):
        raise ValueError(f"lora_B holds {len(bs)} matrices and lora_A {len(as_)}")
    groups: dict[tuple[torch.Size, torch.Size, torch.dtype], list[int]] = {}
    for i, (b, a) in enumerate(zip(bs, as_, strict=True)):
        _check_pair(f"lora_B[{i}]", b, f"lora_A[{i}]", a)
        groups.setdefault((b.shape, a.shape, b.dtype), []).append(i)
    results: list[ProductSVD | None] = [None] * len(bs)
    for indices in groups.values():
        b, a = (torch.stack([ms[i].detach() for i in indices]) for ms in (bs, as_))
        whole = _same_shape(b, a, [f"[{i}]" for i in indices])
        for i, *parts in zip(indices, *whole, strict=True):
            results[i] = ProductSVD(*parts)
    return [r for r in results if r is not None]


def _same_shape(b: Tensor, a: Tensor, names: list[str]) -> ProductSVD:
    """The decompositions of stacks b [n, N, r] and a [n, r, K]."""
    dtype = result_dtype(b.dtype)
    with without_autocast(b):
        b, a = b.detach().double(), a.detach().double()
        exponent = []
        for name, factor in (("lora_B", b), ("lora_A", a)):
            largest = factor.abs().amax(dim=(-2, -1))
            exponent.append(exponents(largest, [name + index for index in names]))
        b, a = scaled(b, exponent[0]), scaled(a, exponent[1])
        u, s, vh = factored(b, a.mT)
        s = torch.ldexp(torch.ldexp(s, exponent[0][:, None]), exponent[1][:, None])
        return ProductSVD(u.to(dtype), s.to(dtype), vh.to(dtype))


def _check_pair(b_name: str, b: Tensor, a_name: str, a: Tensor) -> None:
    check_matrix(b_name, b)
    check_matrix(a_name, a)
    if b.dtype != a.dtype:
        raise TypeError(f"{b_name} is {b.dtype} but {a_name} is {a.dtype}")
    if b.device != a.device:
        raise ValueError(f"{b_name} is on {b.device} but {a_name} is on {a.device}")
    if b.shape[:-2] != a.shape[:-2] or b.shape[-1] != a.shape[-2]:
        raise ValueError(
            f"{b_name} has shape {list(b.shape)} and {a_name} {list(a.shape)}; they must be "
            "[..., N, r] and [..., r, K]"
        )
