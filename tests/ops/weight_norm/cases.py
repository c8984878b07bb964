"""Operands for weight_norm's tests, and the reference's values for them."""

from __future__ import annotations

import torch

from fastlora.ops.weight_norm.reference import weight_norm_reference

SCALING = 0.7
TOLERANCE = 1e-5  # of a float32 result against float64, row by row: what the operation promises


def operands(n, k, r, dtype=torch.float32, seed=0, lost=()):
    """(weight [n, k], lora_A [r, k], lora_B [n, r]).

    In the rows ``lost`` the adapter cancels weight but for one unit in the last place.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    down = max(k, 1) ** -0.5
    weight, a, b = draw(n, k, scale=down), draw(r, k, scale=down), draw(n, r, scale=r**-0.5)
    rows = list(lost)
    if rows:
        weight[rows] = (-SCALING * b[rows].double() @ a.double()).to(dtype)
    return weight, a, b


def exact(weight, a, b, scaling=SCALING):
    """The reference in float64; adapters are rounded to weight's dtype first, as promised."""
    a, b = (t.detach().to(weight.dtype).double() for t in (a, b))
    return weight_norm_reference(weight.detach().double(), a, b, scaling)


def error(got, expected):
    """The largest relative error of any row."""
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    if expected.numel() == 0:
        return 0.0
    return float(((got.double() - expected).abs() / expected).max())


def laid_out(matrix, layout):
    """The same values in another layout: "rows", "columns" (transposed) or "strided"."""
    if layout == "columns":
        return matrix.t().contiguous().t()
    if layout == "strided":
        wide = matrix.new_full((matrix.shape[0], 2 * matrix.shape[1] + 3), float("nan"))
        wide[:, 1 : 1 + 2 * matrix.shape[1] : 2] = matrix
        return wide[:, 1 : 1 + 2 * matrix.shape[1] : 2]
    return matrix.contiguous()
