"""DoRA's layer: weight norm and adapter_linear, as ``nn.LoRALinear`` puts them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.throughput.case import Cell, Operation, Provider, Step
from bench.throughput.operations import linears
from bench.throughput.providers import backends, chosen
from fastlora.ops import adapter_linear
from fastlora.ops.adapter_linear.contract import BACKENDS
from fastlora.ops.dropout import keep_scale
from fastlora.ops.weight_norm import WeightNormCache, weight_norm


def dense_layer(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, dropout: float
) -> Tensor:
    """The formula with B @ A, its norm a constant in backward."""
    linear = torch.nn.functional.linear
    with torch.no_grad():
        adapted = weight + linears.SCALING * (lora_B @ lora_A)
        norm = torch.linalg.vector_norm(adapted, dim=1, dtype=torch.float32).to(x.dtype)
    g = magnitude / norm
    if not dropout:
        return g * (linear(x, weight) + linear(linear(x, lora_A), lora_B) * linears.SCALING)
    inner = torch.nn.functional.dropout(x, dropout)
    update = linear(linear(inner, lora_A), lora_B) * linears.SCALING
    return linear(x, weight) + (g - 1) * linear(inner, weight) + g * update


def _stepped(cell: Cell, own: linears.Operands, build: Callable[..., Step]) -> Step:
    """As after an optimizer's step: no norm of the last call is this call's."""
    step = build(cell, own)

    @torch.no_grad()
    def touch() -> None:
        own.layers[0].lora_B.mul_(1.0)

    step.before = touch
    return step


def _ours(cell: Cell, own: linears.Operands, backend: str) -> Step:
    (layer,) = own.layers
    assert layer.magnitude is not None
    magnitude = layer.magnitude
    cache = WeightNormCache()

    def forward() -> list[Tensor]:
        norm = weight_norm(*layer[:3], linears.SCALING, cache=cache, backend=backend)
        y = adapter_linear(
            own.x, *layer[:3], linears.SCALING, dropout_p=cell.dropout,
            out_scale=magnitude / norm, drop_base=cell.dropout > 0, backend=backend,
        )  # fmt: skip
        return [y]

    return Step(forward, own.leaves())


def _peft(cell: Cell, own: linears.Operands) -> Step:
    return linears.peft_step(cell, own, use_dora=True)


def _providers(cell: Cell) -> list[Provider]:
    found = [
        *linears.baselines(cell, dense_layer),
        Provider("peft", _peft),
        *(
            Provider(f"fastlora-{name}", partial(_ours, backend=name), keep_scale=keep_scale)
            for name in backends(BACKENDS, cell.device, cell.element)
        ),
    ]
    return [replace(each, build=partial(_stepped, build=each.build)) for each in found]


OPERATION = Operation(
    name="dora",
    about="DoRA's layer, norm included, as in training: lora_B has changed since the last call",
    passes=linears.PASSES,
    rival="peft",
    cells=partial(linears.single_cells, "dora"),
    operands=partial(linears.operands, magnitudes=True),
    providers=_providers,
    chosen=lambda cell: chosen("adapter_linear", BACKENDS, cell.device, cell.element),
    work=partial(linears.work, dora=True),
    set_bytes=linears.set_bytes,
    exact=linears.exact,
    probe=partial(linears.probe, magnitudes=True),
)
