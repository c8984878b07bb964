"""Fused layers inside an existing peft model, and back.

A layer is fused by giving the module a subclass of its own class: parameters, state-dict keys,
hooks, adapter bookkeeping and every method but ``forward`` stay peft's. Each forward looks at the
layer as it is at that moment; whatever the fused path does not cover runs peft's own forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from fastlora.adapters.report import Report, Row
from fastlora.adapters.view import plain_modules
from fastlora.nn.plain import added_behaviour
from fastlora.ops.adapter_linear import adapter_linear
from fastlora.ops.backend import HALF

_WEIGHTS = (nn.Parameter, Tensor)
_DTYPES = (torch.float32, torch.float64, *HALF)


def accelerate(peft_model: nn.Module, strict: bool = False) -> Report:
    """Make the LoRA layers of a peft model run fastlora's operation, in place.

    Everything peft does with the model keeps working: it remains a peft model with the same
    parameters, keys and methods; only a second derivative through the layers is not available.
    ``restore`` undoes it. Calling it again covers layers that were
    added in the meantime.

    Args:
        peft_model: a model with peft LoRA layers (a ``PeftModel`` or a model they were put into).
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
    fusable: list[PeftLinear] = []
    for name, module in plain_modules(peft_model):
        if not isinstance(module, BaseTunerLayer):
            continue
        if reason := _never_reason(module):
            report.skipped.append(Row(name, reason))
            continue
        assert isinstance(module, PeftLinear)
        fusable.append(module)
        if reason := _reason(module):
            report.skipped.append(Row(name, f"for now peft's forward: {reason}"))
        else:
            (adapter,) = _active(module)
            detail = f"adapter '{adapter}', r={module.r[adapter]}"
            report.fused.append(Row(name, f"{detail}, scaling={module.scaling[adapter]:g}"))
    if not report.fused and not report.skipped:
        raise ValueError(
            "the model has no peft layers to accelerate; for a plain model use fastlora.inject"
        )
    if strict and report.skipped:
        first = report.skipped[0]
        raise ValueError(
            f"strict: {len(report.skipped)} adapted layers cannot be fused, the first is "
            f"{first.name}: {first.detail}"
        )
    for module in fusable:
        module.__class__ = FusedLinear  # type: ignore[assignment]
    return report


def restore(peft_model: nn.Module) -> int:
    """Give every fused layer its peft class back; returns how many there were."""
    count = 0
    for module in peft_model.modules():
        if type(module) is FusedLinear:
            module.__class__ = PeftLinear  # type: ignore[assignment]
            count += 1
    return count


class FusedLinear(PeftLinear):
    """peft's LoRA ``Linear`` whose plain case is one call of ``adapter_linear``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # somebody may still hold this method of a layer that has been restored
        if type(self) is not FusedLinear or args or kwargs or _reason(self, x) is not None:
            return PeftLinear.forward(self, x, *args, **kwargs)
        (adapter,) = _active(self)
        modules: Any = self._modules
        base = modules["base_layer"]
        dropout = modules["lora_dropout"]._modules[adapter]
        return adapter_linear(
            x,
            base.weight if type(base) is nn.Linear else base.weight.t(),
            modules["lora_A"]._modules[adapter].weight,
            modules["lora_B"]._modules[adapter].weight,
            self.scaling[adapter],
            base.bias,
            dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
        )

    def _get_name(self) -> str:
        return PeftLinear.__name__  # the printed model stays as peft prints it


def _never_reason(module: Any) -> str | None:
    """Why this layer cannot be swapped at all, as a sentence; None if it can."""
    kind = type(module)
    if kind not in (PeftLinear, FusedLinear):
        return f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__} has no fused form"
    if "forward" in module.__dict__:  # hooks on the layer itself keep running
        return "its forward has been replaced on the instance"
    base = module.base_layer
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base is a {type(base).__name__}, not an nn.Linear"
    if base.weight.dtype not in _DTYPES or type(base.weight) not in _WEIGHTS:
        return f"its base weight is a {type(base.weight).__name__} of {base.weight.dtype}"
    for name in module.active_adapters:
        if name in module.lora_variant:
            variant = type(module.lora_variant[name]).__name__
            return f"adapter '{name}' computes {variant}, which has no fused form"
    return None


def _active(layer: Any) -> list[str]:
    """The active adapters that this layer has; the others do not concern it."""
    present = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in present]


def _reason(layer: Any, x: Tensor | None = None) -> str | None:
    """Why the layer, as it is now, runs peft's forward, as a sentence; None if it runs fused.

    Runs at every forward: modules and parameters are read from their dicts, which takes a third of
    the time that nn.Module's attribute lookup takes.
    """
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "an adapter is merged"
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} adapters are active here"
    adapter = active[0]
    if adapter in layer.lora_variant:
        return f"adapter '{adapter}' computes {type(layer.lora_variant[adapter]).__name__}"
    modules = layer._modules
    base = modules["base_layer"]
    lora_A = modules["lora_A"]._modules[adapter]
    lora_B = modules["lora_B"]._modules[adapter]
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}"
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
    if lora_A.bias is not None or lora_B.bias is not None:
        return "the adapter has a bias (lora_bias)"
    if type(dropout) is nn.Dropout:
        if dropout.p >= 1.0:
            return "lora_dropout drops everything"
    elif type(dropout) is not nn.Identity:
        return f"lora_dropout is a {type(dropout).__name__}"
    for part in (base, lora_A, lora_B, dropout):
        if added := added_behaviour(part):
            return f"of its {type(part).__name__}: {added}"
    weight, weight_A, weight_B = base.weight, lora_A.weight, lora_B.weight
    for tensor in (weight, weight_A, weight_B):
        if type(tensor) not in _WEIGHTS:
            return f"a weight is a {type(tensor).__name__}, not a plain tensor"
    device, dtype = weight.device, weight.dtype
    if weight_A.device != device or weight_B.device != device:
        return "the adapter is on another device than the base weight"
    scaling = layer.scaling[adapter]
    if isinstance(scaling, Tensor):
        return "its scaling is a tensor, as peft prepares it for compiled hot swapping"
    if not -math.inf < scaling < math.inf:
        return "its scaling is not finite"
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return "a global module hook is to see every part"
    if x is not None:
        if x.device != device:
            return "the input is on another device than the base weight"
        if torch.is_autocast_enabled(device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        elif x.dtype != dtype:
            return f"the input is {x.dtype} over a base of {dtype}"
    for tensor in (weight_A, weight_B):
        if tensor.dtype != dtype and not (tensor.dtype == torch.float32 and dtype in HALF):
            return f"the adapter is {tensor.dtype} over a computation in {dtype}"
    return None
