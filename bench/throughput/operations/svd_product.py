"""``svd_product``: the exact SVD of a block's products B·A, from their factors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bench.low_rank_svd import ORTHOGONAL, PRODUCT, off_orthogonal
from bench.throughput.case import (
    Cell,
    Operation,
    Provider,
    Request,
    Step,
    Unavailable,
    Verdict,
    Work,
)
from bench.throughput.operations import svd_lowrank
from fastlora.ops import svd_product

LARGEST = 1 << 21  # elements; forming and decomposing what is larger takes minutes

Pair = tuple[list[Tensor], list[Tensor]]  # B's, A's


def _cells(request: Request) -> Iterable[Cell]:
    for cell in svd_lowrank.OPERATION.cells(request):
        yield cell._replace(op="svd_product")


def _operands(cell: Cell, seed: int) -> Pair:
    generator = torch.Generator(cell.device).manual_seed(seed)

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        own = torch.randn(rows, columns, device=cell.device, generator=generator)
        return own.mul_(scale).to(cell.element)

    b = [draw(n, cell.rank, 0.02) for n in cell.n]
    return b, [draw(cell.rank, k, k**-0.5) for k in cell.k]


def _plain(cell: Cell, own: Pair) -> Step:
    if max(n * k for n, k in zip(cell.n, cell.k, strict=True)) > LARGEST:
        raise Unavailable("the SVD of formed products takes minutes at this size")
    b, a = own

    def forward() -> list[Tensor]:
        found = []
        for left, right in zip(b, a, strict=True):
            formed = torch.linalg.svd(left.float() @ right.float(), full_matrices=False)
            u, s, vh = formed
            found += [u[:, : cell.rank], s[: cell.rank], vh[: cell.rank]]
        return found

    return Step(forward)


def _ours(cell: Cell, own: Pair) -> Step:
    return Step(lambda: [part for triple in svd_product(*own) for part in triple])


def _check(cell: Cell, own: Pair, steps: dict[str, Step]) -> dict[str, Verdict]:
    """Orthonormal factors whose product is BA."""
    verdicts = {}
    for name, step in steps.items():
        parts = [part.double() for part in step.forward()]
        off = turned = 0.0
        for i, (b, a) in enumerate(zip(*own, strict=True)):
            u, s, vh = parts[3 * i : 3 * i + 3]
            exact = b.double() @ a.double()
            left = torch.linalg.matrix_norm((u * s) @ vh - exact)
            off = max(off, (left / torch.linalg.matrix_norm(exact)).item())
            turned = max(turned, off_orthogonal(u), off_orthogonal(vh.mT))
        # LAPACK in float32 keeps its own few units, ours computes in float64
        limit = PRODUCT if name != "plain" else 10 * PRODUCT
        wrong = None if off <= limit else f"the product is off by {off:.1e}"
        if not turned <= ORTHOGONAL:
            wrong = f"orthonormal to {turned:.1e} only"
        verdicts[name] = Verdict({"product": off, "orthogonal": turned}, wrong)
    return verdicts


def _work(cell: Cell, which: str) -> Work:
    """Both factors read and both results written; their Gram matrices and the two products."""
    r, rows = cell.rank, sum(cell.n) + sum(cell.k)
    return Work(4 * rows * r * r, rows * r * (cell.element.itemsize + 4))


OPERATION = Operation(
    name="svd_product",
    about="exact SVDs of a block's seven products B·A; plain forms and decomposes them",
    passes=("svd",),
    rival="plain",
    cells=_cells,
    operands=_operands,
    providers=lambda cell: [Provider("plain", _plain), Provider("fastlora", _ours)],
    chosen=lambda cell: "fastlora",
    work=_work,
    set_bytes=lambda cell: 8 * cell.rank * (sum(cell.n) + sum(cell.k)),
    check=_check,
)
