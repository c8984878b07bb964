"""``weight_norm``: DoRA's ‖W + sBA‖ of each row."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.throughput.case import Cell, Operation, Provider, Request, Results, Step, Work
from bench.throughput.operations import linears
from bench.throughput.providers import backends, chosen, compiled, rival
from bench.weight_norm import SCALING, dense_way, peft_way
from fastlora.ops.weight_norm import WeightNormCache, weight_norm
from fastlora.ops.weight_norm.contract import BACKENDS
from fastlora.ops.weight_norm.reference import weight_norm_reference


def _cells(request: Request) -> Iterable[Cell]:
    yield from linears.single_cells("weight_norm", request._replace(m=[0], dropout=[0.0]))


@torch.no_grad()
def _operands(cell: Cell, seed: int) -> linears.Layer:
    whole = linears.operands(cell._replace(m=1), seed).layers[0]
    return linears.Layer(*(t.detach() for t in whole[:3]))


def _exact(cell: Cell, own: linears.Layer, computes: str, masks: Any, keep_scale: float) -> Results:
    W, A, B = (t.double() for t in own[:3])
    if computes == "bare":
        return {"y0": torch.linalg.vector_norm(W, dim=1)}
    return {"y0": weight_norm_reference(W, A, B, SCALING)}


def _work(cell: Cell, which: str) -> Work:
    (n,), (k,), r = cell.n, cell.k, cell.rank
    return Work(2 * n * k * (r + 1), cell.element.itemsize * (n * k + r * (n + k)) + 4 * n)


def _bare(cell: Cell, own: linears.Layer) -> Step:
    return Step(lambda: [torch.linalg.vector_norm(own.weight, dim=1, dtype=torch.float32)])


def _dense(cell: Cell, own: linears.Layer) -> Step:
    return Step(lambda: [dense_way(*own[:3])])


def _compiled(cell: Cell, own: linears.Layer) -> Step:
    whole = compiled(dense_way)
    return Step(lambda: [whole(*own[:3])])


def _peft(cell: Cell, own: linears.Layer) -> Step:
    rival("peft")
    return Step(lambda: [peft_way(*own[:3])])


def _ours(cell: Cell, own: linears.Layer, backend: str | None) -> Step:
    return Step(lambda: [weight_norm(*own[:3], SCALING, backend=backend)])


def _cached(cell: Cell, own: linears.Layer) -> Step:
    """As in training: lora_B has changed since the last call, the weight has not."""
    cache = WeightNormCache()

    def forward() -> list[Tensor]:
        return [weight_norm(*own[:3], SCALING, cache=cache)]

    return Step(forward, before=lambda: own.lora_B.mul_(1.0))


def _providers(cell: Cell) -> list[Provider]:
    return [
        Provider("bare", _bare, computes="bare"),
        Provider("plain", _dense),
        Provider("compiled", _compiled),
        Provider("peft", _peft),
        *(
            Provider(f"fastlora-{name}", partial(_ours, backend=name))
            for name in backends(BACKENDS, cell.device, cell.element)
        ),
        Provider("fastlora-cached", _cached),
    ]


OPERATION = Operation(
    name="weight_norm",
    about="DoRA's row norms; plain is dense B @ A, bare reads W once, cached has ‖W‖² from before",
    passes=("norm",),
    rival="peft",
    cells=_cells,
    operands=_operands,
    providers=_providers,
    chosen=lambda cell: chosen("weight_norm", BACKENDS, cell.device, cell.element),
    work=_work,
    set_bytes=linears.set_bytes,
    exact=_exact,
)
