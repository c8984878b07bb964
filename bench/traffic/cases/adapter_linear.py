"""The skinny passes of ``adapter_linear``, which ``adapter_group`` launches too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from bench.cards import Card
from bench.traffic.cases.case import Case, Shape, randn
from fastlora.ops.adapter_linear import tiles
from fastlora.ops.dropout import threshold

_PARTS_OF_H = (
    "one read of dY gives both H, a sum over n, and dB, a sum over m: whichever way the programs "
    "walk, the other sum is cut into parts, and 2 a multiprocessor are under way"
)
_PARTS_OF_A = "dA is a sum over m, which is cut so that every multiprocessor has two programs"
_SPLITS = "K is cut, for the row tiles leave half the card idle"


@contextmanager
def on(card: Card) -> Iterator[None]:
    """The launchers choose as they would on ``card``."""
    from fastlora.ops.adapter_linear import triton as kernels

    with mock.patch.object(kernels, "arch_of", lambda device: card.arch):
        yield


def cases(shape: Shape) -> Iterator[Case]:
    """Each of the kernels that read an activation; and the sum of the parts they leave."""
    from fastlora.ops.adapter_linear import triton as kernels

    m, n, k, r = shape.m, shape.n, shape.k, shape.r
    dtype, arch = shape.dtype, shape.card.arch
    x, dy, y = randn(shape, m, k), randn(shape, m, n), randn(shape, m, n)
    a, b, t = randn(shape, r, k), randn(shape, n, r), randn(shape, m, r)
    seed = torch.tensor([7])
    level = threshold(0.1)
    regular = r <= 16 or r % 16 == 0

    tile = tiles.choose("shrink", dtype, m, 0, k, r, arch, regular)
    splits, _ = tiles.shrink_splits(tile, m, k, r, arch)
    parts = 4 * splits * m * r if splits > 1 else 0
    passes = {"x_ptr": tiles.cdiv(r, tile.BLOCK_R)}
    own = {"x_ptr": x, "a_ptr": a}
    yield Case(
        "shrink",
        own,
        lambda: [kernels.shrink(x, a, 1.0, 0, None)],
        passes, parts, _SPLITS if parts else "",
    )  # fmt: skip
    yield Case(
        "shrink-dropout",
        own,
        lambda: [kernels.shrink(x, a, 1.0, level, seed)],
        passes, parts, _SPLITS if parts else "",
    )  # fmt: skip

    def of_dy(kernel: str) -> tuple[int, int]:
        tile = tiles.choose(kernel, dtype, m, n, 0, r, arch, regular)
        tiles_n, tiles_r = tiles.cdiv(n, tile.BLOCK_N), tiles.cdiv(r, tile.BLOCK_R)
        chunks, _ = tiles.row_chunks(tile.BLOCK_M, m, tiles_n * tiles_r, arch)
        dots = chunks * n if kernel == "bwd_dots" else 0
        return tiles_r, 4 * (tiles_n * m * r + chunks * n * r + dots)

    tiles_r, parts = of_dy("bwd_dy")
    yield Case(
        "dy-pass",
        {"dy_ptr": dy, "b_ptr": b, "t_ptr": t},
        lambda: [one for one in kernels.bwd_dy(dy, b, t, 1.0)[:2] if one is not None],
        {"dy_ptr": tiles_r}, parts, _PARTS_OF_H,
    )  # fmt: skip

    def with_dots() -> list[torch.Tensor]:
        h, db, dots = kernels.bwd_dy(dy, b, t, 1.0, y)
        assert h is not None and db is not None and dots is not None
        return [h, db, *dots]

    tiles_r, parts = of_dy("bwd_dots")
    yield Case(
        "dy-pass-dg",
        {"dy_ptr": dy, "b_ptr": b, "t_ptr": t, "y_ptr": y},
        with_dots,
        {"dy_ptr": tiles_r, "y_ptr": 1}, parts, _PARTS_OF_H,
    )  # fmt: skip

    tile = tiles.choose("bwd_da", dtype, m, 0, k, r, arch, regular)
    tiles_r = tiles.cdiv(r, tile.BLOCK_R)
    programs = tiles.cdiv(k, tile.BLOCK_K) * tiles_r
    chunks, _ = tiles.row_chunks(tile.BLOCK_M, m, programs, arch)
    own = {"h_ptr": t, "x_ptr": x}
    for name, threshold_level in (("x-pass", 0), ("x-pass-dropout", level)):
        yield Case(
            name,
            own,
            lambda level=threshold_level: [kernels.bwd_da(t, x, level, seed)],  # type: ignore
            {"x_ptr": tiles_r}, 4 * chunks * r * k, _PARTS_OF_A,
        )  # fmt: skip

    yield Case("drop", {"x_ptr": x}, lambda: [kernels._drop(x, 1.0, level, seed)], {"x_ptr": 1})
    parts_of_sum = torch.randn(16, n, r)
    yield Case(
        "sum",
        {"parts_ptr": parts_of_sum},
        lambda: [kernels._sum(parts_of_sum, torch.float32)],
        {"parts_ptr": 1},
    )
