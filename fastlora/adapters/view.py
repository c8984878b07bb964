"""One view over the adapted layers of a model, whether fastlora's or peft's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastlora.nn.lora_linear import LoRALinear

PEFT_PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


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


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's and DataParallel's wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) as in ``named_modules``, with the names of the plain model: without what
    peft, torch.compile, FSDP or checkpoint wrappers put into the paths."""
    for name, module in unwrap(model).named_modules():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        yield ".".join(parts).removeprefix(PEFT_PREFIX), module


def _layers(model: nn.Module, adapter: str | None) -> Iterator[AdapterLayer]:
    for name, module in plain_modules(model):
        if isinstance(module, LoRALinear):
            if adapter in (None, "default"):
                yield _ours(name, module)
        elif is_peft_layer(module) and isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            layer: Any = module
            for key in layer.active_adapters if adapter is None else [adapter]:
                if key in layer.lora_A and _is_linear(layer, key):
                    yield _peft(name, module, key)


def _is_linear(module: Any, key: str) -> bool:
    """peft's convolutions, attention blocks and expert parameters use the same dictionaries."""
    weight = getattr(module.get_base_layer(), "weight", None)
    return weight is not None and weight.dim() == 2 and module.lora_A[key].weight.dim() == 2


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
