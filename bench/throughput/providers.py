"""The providers that several operations share: peft's layers, other packages, our backends."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.throughput.case import Unavailable
from fastlora.cli.errors import first_line
from fastlora.ops.backend import Backend, Situation, choose

# other packages, by the provider's name
RIVALS = {
    "peft": "peft",
    "unsloth": "unsloth.kernels.fast_lora",
    "bitsandbytes": "bitsandbytes",
    "lion-pytorch": "lion_pytorch",
    "liger": "liger_kernel",
}
# every name that --providers takes; "fastlora" means all of its backends
NAMES = (
    *("bare", "bare-onednn", "merged", "plain", "compiled", "copy"),
    *RIVALS,
    "adamw-fused",
    *("fastlora", "fastlora-triton", "fastlora-native", "fastlora-onednn", "fastlora-eager"),
)


@functools.cache
def rival(name: str) -> Any:
    """The module of another package; Unavailable, with its reason, where it does not import."""
    try:
        return importlib.import_module(RIVALS[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == RIVALS[name].partition(".")[0]:
            raise Unavailable(f"{name} is not installed") from None
        raise Unavailable(f"{name} does not import: {first_line(error)}") from error
    except Exception as error:  # whatever a package does when it is imported
        raise Unavailable(
            f"{name} does not import: {type(error).__name__}: {first_line(error)}"
        ) from error


def peft_layer(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float, **options: Any
) -> Any:
    """peft's own layer over these very tensors, in training mode."""
    peft = rival("peft")
    n, k = weight.shape
    rank = lora_A.shape[0]
    linear = torch.nn.Linear(k, n, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,
        lora_dropout=dropout,
        target_modules=["linear"],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"linear": linear}))
    layer = model["linear"]
    layer.lora_A["default"].weight = torch.nn.Parameter(lora_A.detach())
    layer.lora_B["default"].weight = torch.nn.Parameter(lora_B.detach())
    return layer.train()


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function, once for all shapes."""
    return torch.compile(function, dynamic=True)


def backends(entries: tuple[Backend, ...], device: str, dtype: torch.dtype) -> list[str]:
    """Those of ours that run here, interpreters aside."""
    at = Situation(torch.device(device), dtype)
    names = [entry.name for entry in entries if not entry.cannot(at)]
    return [name for name in names if name != "triton" or at.device.type == "cuda"]


def chosen(op: str, entries: tuple[Backend, ...], device: str, dtype: torch.dtype) -> str:
    """The provider that is taken where nobody asks for a backend."""
    return "fastlora-" + choose(op, entries, torch.device(device), dtype).name
