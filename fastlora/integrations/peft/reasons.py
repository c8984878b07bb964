"""Why a layer runs peft's forward: the sentences that layers of different kinds share.

Most of these run at every forward. Modules and parameters are read from their dicts, which takes a
third of the time that nn.Module's attribute lookup takes.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastlora.nn.adapted import FLOATS
from fastlora.nn.plain import added_behaviour
from fastlora.ops.backend import HALF

WEIGHTS = (nn.Parameter, Tensor)


def of_class(layer: Any, *bases: type[nn.Module]) -> str | None:
    """Why the layer cannot be fused in any state; None if it can."""
    if "forward" in layer.__dict__:  # hooks on the layer itself keep running
        return "its forward has been replaced on the instance"
    base = layer.base_layer
    if type(base) not in bases:
        return f"its base is a {type(base).__name__}, not an nn.{bases[0].__name__}"
    if base.weight.dtype not in FLOATS or type(base.weight) not in WEIGHTS:
        return f"its base weight is a {type(base.weight).__name__} of {base.weight.dtype}"
    return None


def of_variants(layer: Any, *fused: type) -> str | None:
    """Why an active adapter has no fused form, if it computes a variant other than ``fused``."""
    for name in layer.active_adapters:
        variant = layer.lora_variant.get(name)
        if variant is not None and type(variant) not in fused:
            kind = type(variant).__name__
            return f"adapter '{name}' computes {kind}, which has no fused form"
    return None


def active(layer: Any, present: Container[str]) -> list[str]:
    """The active adapters among those that the layer has; the others do not concern it."""
    names = layer._active_adapter
    if isinstance(names, str):
        return [names] if names in present else []
    return [name for name in names if name in present]


def of_state(layer: Any, active: list[str]) -> str | None:
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "an adapter is merged"
    return None if len(active) == 1 else f"{len(active)} adapters are active here"


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    found = module._parameters
    try:
        return found["weight"], found["bias"]
    except KeyError:  # a replica of DataParallel's, for one, has them elsewhere
        return module.weight, module.bias


def of_parts(*parts: nn.Module) -> str | None:
    """What a call of one of these modules, which the fused path bypasses, would do besides."""
    for part in parts:
        if added := added_behaviour(part):
            return f"of its {type(part).__name__}: {added}"
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return "a global module hook is to see every part"
    return None


def of_dropout(dropout: Any, name: str = "lora_dropout") -> str | None:
    if type(dropout) is nn.Dropout:
        return f"{name} drops everything" if dropout.p >= 1.0 else None
    return None if type(dropout) is nn.Identity else f"{name} is a {type(dropout).__name__}"


def of_scaling(scaling: Any) -> str | None:
    if isinstance(scaling, Tensor):
        return "its scaling is a tensor, as peft prepares it for compiled hot swapping"
    return None if -math.inf < scaling < math.inf else "its scaling is not finite"


def of_tensors(weight: Tensor, adapter: tuple[Tensor, ...], x: Tensor | None) -> str | None:
    """Whether base weight, the adapter's tensors and the input x (if there is one yet) go together
    as ``adapter_linear`` takes them."""
    if type(weight) not in WEIGHTS:
        return f"a weight is a {type(weight).__name__}, not a plain tensor"
    device, dtype = weight.device, weight.dtype
    if x is not None:
        if x.device != device:
            return "the input is on another device than the base weight"
        if torch.is_autocast_enabled(device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        elif x.dtype != dtype:
            return f"the input is {x.dtype} over a base of {dtype}"
    for tensor in adapter:
        if type(tensor) not in WEIGHTS:
            return f"a weight is a {type(tensor).__name__}, not a plain tensor"
        if tensor.device != device:
            return "the adapter is on another device than the base weight"
        if tensor.dtype != dtype and not (tensor.dtype == torch.float32 and dtype in HALF):
            return f"the adapter is {tensor.dtype} over a computation in {dtype}"
    return None


def of_dora(magnitude: Any, weight: Tensor, adapter: tuple[Tensor, ...]) -> str | None:
    """What DoRA asks for beside that: ``weight_norm`` reads the weight in its own dtype."""
    if added := added_behaviour(magnitude):
        return f"of its {type(magnitude).__name__}: {added}"
    dtype = weight.dtype
    for tensor in adapter:
        if tensor.dtype != dtype and not (tensor.dtype == torch.float32 and dtype in HALF):
            return f"the adapter is {tensor.dtype} over a weight of {dtype}, whose norm DoRA needs"
    return None


def in_transform() -> bool:
    """Whether tensors may stand for others now: under torch.compile or torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
