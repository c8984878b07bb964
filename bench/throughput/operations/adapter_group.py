"""``adapter_group``: adapted layers that read one x (q, k, v; gate, up)."""

from __future__ import annotations

from functools import partial

from bench.throughput.case import Cell, Operation, Provider, Step
from bench.throughput.operations import linears
from bench.throughput.providers import backends, chosen
from fastlora.ops import Member, adapter_group
from fastlora.ops.adapter_group.contract import BACKENDS
from fastlora.ops.dropout import keep_scale


def _ours(cell: Cell, own: linears.Operands, backend: str) -> Step:
    members = [Member(*layer[:3], linears.SCALING, dropout_p=cell.dropout) for layer in own.layers]
    return Step(lambda: adapter_group(own.x, members, backend=backend), own.leaves())


def _providers(cell: Cell) -> list[Provider]:
    return [
        *linears.baselines(cell),
        Provider("peft", linears.peft_step),
        Provider("unsloth", linears.unsloth_step),
        Provider("liger", linears.liger_step),
        *(
            Provider(f"fastlora-{name}", partial(_ours, backend=name), keep_scale=keep_scale)
            for name in backends(BACKENDS, cell.device, cell.element)
        ),
    ]


OPERATION = Operation(
    name="adapter_group",
    about="adapted layers that read one x",
    passes=linears.PASSES,
    rival="peft",
    cells=partial(linears.group_cells, "adapter_group"),
    operands=linears.operands,
    providers=_providers,
    chosen=lambda cell: chosen("adapter_group", BACKENDS, cell.device, cell.element),
    work=linears.work,
    set_bytes=linears.set_bytes,
    exact=linears.exact,
    probe=linears.probe,
)
