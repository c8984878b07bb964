"""DoRA's norms, by ``weight_norm``'s two kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from bench.cards import Card
from bench.traffic.cases.case import Case, Shape, randn
from fastlora.ops.weight_norm import tiles


@contextmanager
def on(card: Card) -> Iterator[None]:
    """The launcher chooses as it would on ``card``."""
    from fastlora.ops.weight_norm import triton as kernels

    with mock.patch.object(kernels, "_arch", lambda device: card.arch):
        yield


def cases(shape: Shape) -> Iterator[Case]:
    """Of a weight as Linear keeps it, and as Conv1D does."""
    from fastlora.ops.weight_norm import triton as kernels

    n, k, r = shape.n, shape.k, shape.r
    a, b = randn(shape, r, k), randn(shape, n, r)
    regular = n % 16 == 0 and k % 16 == 0 and (r <= 16 or r % 16 == 0)
    tile = tiles.choose("rows", shape.dtype, r, shape.card.arch, regular)
    splits, _ = tiles.splits(tile, n, k, shape.card.arch)
    for name, weight in (
        ("weight-norm", randn(shape, n, k)),
        ("weight-norm-transposed", randn(shape, k, n).t()),
    ):
        yield Case(
            name,
            {"w_ptr": weight, "a_ptr": a, "b_ptr": b},
            lambda weight=weight: [kernels.forward(weight, a, b, 0.01, None)[0]],  # type: ignore
            {"w_ptr": 1},
            4 * (2 * splits * n + splits * r),
            "the sum over K is cut, so that every multiprocessor has four programs",
        )
