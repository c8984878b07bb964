"""``svd_lowrank``: the leading singular triples of a block's weights, as PiSSA starts from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from bench.low_rank_svd import ESTIMATE, ORTHOGONAL, distance, loop, off_orthogonal
from bench.throughput.case import Cell, Operation, Provider, Request, Step, Verdict, Work
from bench.throughput.shapes import MODELS
from fastlora.ops import svd_lowrank

NITER = 4


def _cells(request: Request) -> Iterable[Cell]:
    if request.layers is not None and "block" not in request.layers:
        return
    for model in request.shapes:
        n, k = zip(*MODELS[model].block(), strict=True)
        for dtype in request.dtype:
            for rank in request.rank:
                if rank <= min(*n, *k):
                    yield Cell(
                        "svd_lowrank", model, "block", n, k, 0, rank, 0.0, dtype, request.device
                    )


def _operands(cell: Cell, seed: int) -> list[Tensor]:
    """Matrices whose singular values fall off about as i^-½."""
    generator = torch.Generator(cell.device).manual_seed(seed)
    found = []
    for n, k in zip(cell.n, cell.k, strict=True):
        noise = torch.randn(n, k, device=cell.device, generator=generator)
        falling = (torch.arange(k, device=cell.device) + 1.0) ** -0.5
        found.append((noise * falling).to(cell.element))
    return found


def _flat(triples: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    return [part for triple in triples for part in triple]


def _plain(cell: Cell, own: list[Tensor]) -> Step:
    wide = [x.float() for x in own]  # torch.svd_lowrank takes no half precision

    def forward() -> list[Tensor]:
        return _flat(loop(x.unsqueeze(0), cell.rank, NITER)[0] for x in wide)

    return Step(forward)


def _ours(cell: Cell, own: list[Tensor]) -> Step:
    return Step(lambda: _flat(svd_lowrank(own, cell.rank, NITER)))


def _check(cell: Cell, own: list[Tensor], steps: dict[str, Step]) -> dict[str, Verdict]:
    """Orthonormal; an error that is what is left; and on average no worse than torch's."""
    verdicts, means = {}, {}
    for name, step in sorted(steps.items(), key=lambda item: item[0] != "plain"):
        torch.manual_seed(0)
        parts = list(step.forward())
        size = len(parts) // len(own)
        off, turned, estimated = [], 0.0, 0.0
        for i, x in enumerate(own):
            u, s, vh, *error = parts[i * size : (i + 1) * size]
            exact = distance(x, u, s, vh)
            off.append(exact.item())
            turned = max(turned, off_orthogonal(u), off_orthogonal(vh.mT))
            if error:
                told = error[0].double() / torch.linalg.matrix_norm(x.double())
                estimated = max(estimated, (told / exact - 1).abs().item())
        means[name] = statistics.mean(off)
        wrong = None
        if not turned <= ORTHOGONAL:
            wrong = f"orthonormal to {turned:.1e} only"
        elif not estimated <= ESTIMATE:
            wrong = "the error it tells is not what is left"
        elif "plain" in means and not means[name] <= means["plain"]:
            wrong = f"its error is {means[name]:.6f}, torch's {means['plain']:.6f}"
        verdicts[name] = Verdict({"orthogonal": turned, "relative error": means[name]}, wrong)
    return verdicts


def _work(cell: Cell, which: str) -> Work:
    """Each matrix is multiplied with q columns once from either side, whatever the iteration."""
    elements = sum(n * k for n, k in zip(cell.n, cell.k, strict=True))
    return Work(4 * elements * cell.rank, 2 * elements * cell.element.itemsize)


OPERATION = Operation(
    name="svd_lowrank",
    about="rank-r SVDs of a block's seven weights; plain is torch.svd_lowrank in a loop",
    passes=("svd",),
    rival="plain",
    cells=_cells,
    operands=_operands,
    providers=lambda cell: [Provider("plain", _plain), Provider("fastlora", _ours)],
    chosen=lambda cell: "fastlora",
    work=_work,
    set_bytes=lambda cell: 8 * sum(n * k for n, k in zip(cell.n, cell.k, strict=True)),
    check=_check,
)
