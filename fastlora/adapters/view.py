"""One view over the adapted layers of a model, whether fastlora's or peft's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastlora.nn.lora_linear import LoRALinear

PEFT_PREFIX = "base_model.model."


@dataclass
class AdapterLayer:
    """A linear layer and one adapter on it; tensors are the live parameters.

    ``name`` is the module's path in the plain model (peft's wrapping left out), so that the same
    layer has the same name in both worlds. ``weight`` is [N, K] ([K, N] where ``transposed``, as
    in transformers' Conv1D), ``lora_A`` [r, K], ``lora_B`` [N, r]; ``vectors`` holds what else
    the method trains there, by peft's name.
    """

    name: str
    module: nn.Module
    adapter: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    merged: bool
    transposed: bool = False
    vectors: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]


def layers(model: nn.Module, adapter: str | None = None) -> list[AdapterLayer]:
    """Every linear layer of ``model`` that carries a low-rank adapter, in the model's order.

    ``adapter`` names one of peft's adapters; None means those that are active. An unadapted model
    gives an empty list. Raises ValueError for an adapter name that no layer has.
    """
    found = list(_layers(model, adapter))
    if adapter is not None and not found:
        raise ValueError(f"no layer of the model has an adapter named '{adapter}'")
    return found


def is_peft_layer(module: nn.Module) -> bool:
    """Whether this is one of peft's tuner layers; peft itself is not imported to tell."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer")


def plain_name(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX)


def _layers(model: nn.Module, adapter: str | None) -> Iterable[AdapterLayer]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            if adapter in (None, "default"):
                yield _ours(name, module)
        elif is_peft_layer(module) and isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            wanted = module.active_adapters if adapter is None else [adapter]
            for key in wanted:
                if key in module.lora_A:
                    yield _peft(plain_name(name), module, key)


def _ours(name: str, module: LoRALinear) -> AdapterLayer:
    return AdapterLayer(
        name=name,
        module=module,
        adapter="default",
        weight=module.weight,
        bias=module.bias,
        lora_A=module.lora_A.weight,
        lora_B=module.lora_B.weight,
        scaling=module.scaling,
        lora_alpha=module.lora_alpha,
        lora_dropout=module.lora_dropout,
        use_rslora=module.use_rslora,
        merged=module.merged,
    )


def _peft(name: str, module: Any, key: str) -> AdapterLayer:
    base = module.get_base_layer()
    vectors = {}
    if key in getattr(module, "lora_magnitude_vector", {}):
        vectors["lora_magnitude_vector"] = module.lora_magnitude_vector[key].weight
    if module.lora_B[key].bias is not None:
        vectors["lora_B.bias"] = module.lora_B[key].bias
    return AdapterLayer(
        name=name,
        module=module,
        adapter=key,
        weight=base.weight,
        bias=getattr(base, "bias", None),
        lora_A=module.lora_A[key].weight,
        lora_B=module.lora_B[key].weight,
        scaling=module.scaling[key],
        lora_alpha=module.lora_alpha[key],
        lora_dropout=getattr(module.lora_dropout[key], "p", 0.0),
        use_rslora=module.use_rslora.get(key, False),
        merged=key in module.merged_adapters,
        transposed=getattr(module, "fan_in_fan_out", False),
        vectors=vectors,
    )
