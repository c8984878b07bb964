"""One view over the adapted layers of a model, whether fastlora's or peft's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nn import AdaLoRALinear, AdaptedLayer, LoRAConv, LoRAEmbedding, VeRALinear

PEFT_PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass
class AdapterLayer:
    """A layer and one adapter on it; tensors are the live parameters.

    Attributes:
        name: the module's path in the plain model (peft's prefix left out), so that the same
            layer has the same name in both worlds. Inside a module that peft wraps whole, as
            ``nn.MultiheadAttention``, the path keeps peft's ``base_layer``.
        module, adapter: the layer, and the adapter's name.
        method: peft's name of the kind of adapter: "LORA" (rsLoRA, DoRA and LoRA-FA too),
            "ADALORA" or "VERA".
        kind: "linear", "embedding" or "conv".
        weight: [N, K] ([K, N] where ``transposed``, as in transformers' Conv1D), [V, D] of an
            embedding, [N, C, kernel...] of a convolution.
        tensors: the adapter's own parameters by the ends of their keys in peft's files, as
            "lora_A.weight" or "vera_lambda_d".
        lora_A, lora_B: the low-rank factors, [r, K] and [N, r] of a linear; of VeRA the shared
            projections' slices.
        scaling, lora_alpha, lora_dropout, use_rslora, merged: as their names say; lora_dropout is
            VeRA's vera_dropout too, and VeRA has a scaling of 1 and no lora_alpha.
    """

    name: str
    module: nn.Module
    adapter: str
    method: str
    kind: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    tensors: dict[str, nn.Parameter]
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    lora_alpha: float | None
    lora_dropout: float
    use_rslora: bool
    merged: bool
    transposed: bool = False

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]


def layers(model: nn.Module, adapter: str | None = None) -> list[AdapterLayer]:
    """Every layer of ``model`` that carries a low-rank adapter, in the model's order.

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


def our_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """(name, layer) of every adapted layer of fastlora's own, in the model's order."""
    return [(name, m) for name, m in plain_modules(model) if isinstance(m, AdaptedLayer)]


def _layers(model: nn.Module, adapter: str | None) -> Iterator[AdapterLayer]:
    for name, module in plain_modules(model):
        if isinstance(module, AdaptedLayer):
            if adapter in (None, "default"):
                yield _ours(name, module)
        elif is_peft_layer(module):
            layer: Any = module
            for key in layer.active_adapters if adapter is None else [adapter]:
                for part, read in _PEFT.items():
                    if key in (getattr(layer, part, None) or {}):
                        seen = read(name, layer, key)
                        if seen is not None:
                            yield seen


def _ours(name: str, module: AdaptedLayer) -> AdapterLayer:
    layer: Any = module
    kind = "linear"
    method = "LORA"
    if isinstance(module, LoRAEmbedding):
        kind, lora_A, lora_B = "embedding", layer.lora_embedding_A, layer.lora_embedding_B
    elif isinstance(module, VeRALinear):
        method = "VERA"
        lora_A, lora_B = module.slices()
    elif isinstance(module, AdaLoRALinear):
        method, lora_A, lora_B = "ADALORA", module.lora_A, module.lora_B
    else:
        kind = "conv" if isinstance(module, LoRAConv) else "linear"
        lora_A, lora_B = layer.lora_A.weight, layer.lora_B.weight
    return AdapterLayer(
        name=name,
        module=module,
        adapter="default",
        method=method,
        kind=kind,
        weight=module.weight,
        bias=module.bias,
        tensors=module.tensors(),
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=getattr(module, "scaling", 1.0),
        lora_alpha=getattr(module, "lora_alpha", None),
        lora_dropout=getattr(module, "lora_dropout", getattr(module, "vera_dropout", 0.0)),
        use_rslora=getattr(module, "use_rslora", False),
        merged=module.merged,
    )


def _peft(
    name: str,
    layer: Any,
    key: str,
    method: str,
    kind: str,
    tensors: dict[str, nn.Parameter],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> AdapterLayer:
    base = layer.get_base_layer()
    dropout = layer.vera_dropout if method == "VERA" else layer.lora_dropout
    magnitudes = getattr(layer, "lora_magnitude_vector", None) or {}
    if key in magnitudes:
        tensors["lora_magnitude_vector"] = magnitudes[key].weight
    return AdapterLayer(
        name=name,
        module=layer,
        adapter=key,
        method=method,
        kind=kind,
        weight=base.weight,
        bias=getattr(base, "bias", None),
        tensors=tensors,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=scaling,
        lora_alpha=None if method == "VERA" else layer.lora_alpha[key],
        lora_dropout=getattr(dropout[key], "p", 0.0),
        use_rslora=method == "LORA" and layer.use_rslora.get(key, False),
        merged=key in layer.merged_adapters,
        transposed=kind == "linear" and getattr(layer, "fan_in_fan_out", False),
    )


def _peft_lora(name: str, layer: Any, key: str) -> AdapterLayer | None:
    """peft's LoRA linears and convolutions, and AdaLoRA's linears; None for what else uses the
    same dictionaries: attention blocks, experts, AdaLoRA's convolutions."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None:
        return None
    A, B = layer.lora_A[key], layer.lora_B[key]
    if isinstance(A, Tensor):
        if key not in getattr(layer, "lora_E", {}) or weight.dim() != 2:
            return None
        tensors = {"lora_A": A, "lora_E": layer.lora_E[key], "lora_B": B}
        with torch.no_grad():
            scaling = float(layer.scaling[key] / (layer.ranknum[key] + 1e-5))
        return _peft(name, layer, key, "ADALORA", "linear", tensors, A, B, scaling)
    if A.weight.dim() != weight.dim():
        return None
    tensors = {"lora_A.weight": A.weight, "lora_B.weight": B.weight}
    if B.bias is not None:
        tensors["lora_B.bias"] = B.bias
    kind = "linear" if weight.dim() == 2 else "conv"
    scaling = layer.scaling[key]
    return _peft(name, layer, key, "LORA", kind, tensors, A.weight, B.weight, scaling)


def _peft_embedding(name: str, layer: Any, key: str) -> AdapterLayer:
    A, B = layer.lora_embedding_A[key], layer.lora_embedding_B[key]
    tensors = {"lora_embedding_A": A, "lora_embedding_B": B}
    return _peft(name, layer, key, "LORA", "embedding", tensors, A, B, layer.scaling[key])


def _peft_vera(name: str, layer: Any, key: str) -> AdapterLayer:
    d, b = layer.vera_lambda_d[key], layer.vera_lambda_b[key]
    A = layer.vera_A[key][:, : layer.in_features]
    B = layer.vera_B[key][: layer.out_features]
    tensors = {"vera_lambda_d": d, "vera_lambda_b": b}
    return _peft(name, layer, key, "VERA", "linear", tensors, A, B, 1.0)


# by the dictionary in which an adapter of the kind is found
_PEFT: dict[str, Callable[[str, Any, str], AdapterLayer | None]] = {
    "lora_A": _peft_lora,
    "lora_embedding_A": _peft_embedding,
    "vera_lambda_d": _peft_vera,
}
