"""Fused layers inside an existing peft model, and back.

A layer is fused by giving the module a subclass of its own class: parameters, state-dict keys,
hooks, adapter bookkeeping and every method but ``forward`` stay peft's. Each forward looks at the
layer as it is at that moment; whatever the fused path does not cover runs peft's own forward.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fastlora.adapters.groups import find_groups, partners
from fastlora.adapters.report import Report, Row
from fastlora.adapters.view import plain_modules
from fastlora.integrations.peft.adalora import FusedSVDLinear
from fastlora.integrations.peft.conv import FusedConv1d, FusedConv2d, FusedConv3d
from fastlora.integrations.peft.embedding import FusedEmbedding
from fastlora.integrations.peft.fused import Fused, Memory
from fastlora.integrations.peft.linear import FusedLinear
from fastlora.integrations.peft.linear_kind import FusedLinearKind
from fastlora.integrations.peft.vera import Copies, FusedVeraLinear
from fastlora.nn.group import InputGroup

__all__ = [
    "Fused",
    "FusedConv1d",
    "FusedConv2d",
    "FusedConv3d",
    "FusedEmbedding",
    "FusedLinear",
    "FusedSVDLinear",
    "FusedVeraLinear",
    "accelerate",
    "restore",
]

_FUSED: tuple[type[Fused], ...] = (
    FusedLinear,
    FusedEmbedding,
    FusedConv1d,
    FusedConv2d,
    FusedConv3d,
    FusedVeraLinear,
    FusedSVDLinear,
)
# of peft's classes, and of those that are fused already
_KINDS: dict[type, type[Fused]] = {
    kind: fused for fused in _FUSED for kind in (fused.peft_class, fused)
}


def accelerate(peft_model: nn.Module, strict: bool = False) -> Report:
    """Make the adapted layers of a peft model run fastlora's operations, in place.

    Covered are LoRA with its variants rsLoRA, DoRA, lora_bias and LoRA-FA on linears (transformers'
    ``Conv1D`` too), embeddings and convolutions, and VeRA and AdaLoRA on linears. Linears that
    read one input (q, k and v; gate and up) are computed together.

    Everything peft does with the model keeps working: it remains a peft model with the same
    parameters, keys and methods; only a second derivative through the layers is not available, and
    where a row of DoRA's W + s·BA is zero, the output is finite and not peft's NaN (0/0). Linears
    that were computed together have one backward, too: going backward through q alone, and later
    through k, takes ``retain_graph=True`` the first time.
    ``restore`` undoes it. Calling it again covers layers that were added in the meantime.

    Args:
        peft_model: a model with peft layers (a ``PeftModel`` or a model they were put into).
        strict: raise instead of leaving any adapted layer unfused.

    Returns:
        A report of the layers that run fused now, and of those that keep peft's forward, each with
        the reason. A layer can also leave the fused path later and come back (merged, disabled,
        two adapters active at once, ``adapter_names`` given, hooks on its parts): peft's own
        forward runs then.

    Raises:
        ValueError: the model has no peft layers, or, with ``strict``, some cannot be fused; nothing
            has changed then.
    """
    report = Report()
    fusable: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, module in plain_modules(peft_model):
        if not isinstance(module, BaseTunerLayer):
            continue
        if reason := _never(module):
            report.skipped.append(Row(name, reason))
            continue
        fusable[name] = module
        fused = _KINDS[type(module)]
        sources = fused.look(module)
        if isinstance(sources, str):
            report.skipped.append(Row(name, f"for now peft's forward: {sources}"))
        else:
            said[name] = f"adapter '{sources.adapter}', {fused.summary(module, sources)}"
    if not said and not report.skipped:
        raise ValueError(
            "the model has no peft layers to accelerate; for a plain model use fastlora.inject"
        )
    if strict and report.skipped:
        first = report.skipped[0]
        raise ValueError(
            f"strict: {len(report.skipped)} adapted layers cannot be fused, the first is "
            f"{first.name}: {first.detail}"
        )
    for names in _fuse(fusable):
        together = [name for name in names if name in said]
        for name in together if len(together) > 1 else ():
            said[name] += f", {partners(name, together)}"
    report.fused = [Row(name, detail) for name, detail in said.items()]
    return report


def restore(peft_model: nn.Module) -> int:
    """Give every fused layer its peft class back; returns how many there were."""
    count = 0
    for module in peft_model.modules():
        if type(module) in _FUSED:
            fused: Any = module
            memory: Memory = fused._fastlora
            if memory.group is not None:
                memory.group.leave(memory.slot)  # its partners may stay as they are
            fused.__class__ = fused.peft_class
            del fused._fastlora
            count += 1
    return count


def _never(module: Any) -> str | None:
    """Why this layer cannot be swapped at all, as a sentence; None if it can."""
    kind = type(module)
    if kind not in _KINDS:
        return f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__} has no fused form"
    return _KINDS[kind].never(module)


def _fuse(layers: dict[str, Any]) -> list[list[str]]:
    """Swap the classes of these layers (by path); returns the paths of those put together."""
    copies = Copies()  # one for the model, whose VeRA layers have one pair of projections
    for layer in layers.values():
        layer.__class__ = _KINDS[type(layer)]
        layer._fastlora = Memory(shared=copies)
    linears: dict[str, Any] = {n: x for n, x in layers.items() if isinstance(x, FusedLinearKind)}
    groups = find_groups(linears)
    for members in groups:
        group = InputGroup.of(list(members.values()))
        for slot, layer in enumerate(members.values()):
            layer._fastlora.group, layer._fastlora.slot = group, slot
    return [list(members) for members in groups]
