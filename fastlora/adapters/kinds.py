"""Which layer adapts which module under which configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastlora.adapters.config import (
    AdaLoRAConfig,
    AdapterConfig,
    LoRAConfig,
    VeRAConfig,
    names_module,
)
from fastlora.adapters.groups import is_kept
from fastlora.nn import (
    AdaLoRALinear,
    AdaptedLayer,
    LoRAConv,
    LoRAEmbedding,
    LoRALinear,
    VeRALinear,
    VeRAProjection,
)
from fastlora.nn.adapted import cannot_adapt
from fastlora.nn.lora_conv import KINDS as CONVOLUTIONS
from fastlora.nn.lora_conv import cannot_adapt_conv
from fastlora.nn.lora_embedding import cannot_adapt_embedding


def refusal(config: AdapterConfig, name: str, module: nn.Module) -> str | None:
    """Why this configuration cannot adapt this module, as a sentence; None if it can."""
    if not isinstance(config, LoRAConfig):
        return cannot_adapt(module, nn.Linear)
    if config.pissa and isinstance(module, (nn.Embedding, *CONVOLUTIONS)):
        return "PiSSA starts linears only, in peft too"
    if isinstance(module, nn.Embedding):
        if config.lora_bias:
            return "embeddings have no lora_bias, in peft neither"
        if config.use_lora_fa:
            return "LoRA-FA freezes A, which starts at zero in an embedding"
        return cannot_adapt_embedding(module)
    if isinstance(module, CONVOLUTIONS):
        if module.groups > 1 and config.use_dora:
            return "DoRA needs the norm of its weight, and it is a grouped convolution"
        if config.rank_of(name) % module.groups:
            return f"its {module.groups} groups do not divide the rank {config.rank_of(name)}"
        return cannot_adapt_conv(module)
    return cannot_adapt(module, nn.Linear)


def build(config: AdapterConfig, targets: list[tuple[str, nn.Module]]) -> list[AdaptedLayer]:
    """An adapted layer for each (name, module), which ``refusal`` has let through."""
    projection = None
    if isinstance(config, VeRAConfig):
        projection = _projection(config, [module for _, module in targets])
    layers: list[AdaptedLayer] = []
    for name, module in targets:
        layer: AdaptedLayer
        if isinstance(config, VeRAConfig):
            assert projection is not None and isinstance(module, nn.Linear)
            layer = VeRALinear.from_linear(
                module,
                projection,
                vera_dropout=config.vera_dropout,
                d_initial=config.d_initial,
                owns_projection=not layers,
            )
        elif isinstance(config, AdaLoRAConfig):
            assert isinstance(module, nn.Linear)
            layer = AdaLoRALinear.from_linear(
                module,
                config.init_r,
                config.lora_alpha,
                config.lora_dropout,
                rank_mask=config.mask_of(name),
            )
        else:
            assert isinstance(config, LoRAConfig)
            layer = _lora(config, name, module)
        layer.config = config
        layers.append(layer)
    return layers


def _lora(config: LoRAConfig, name: str, module: nn.Module) -> AdaptedLayer:
    options: dict[str, Any] = {
        "r": config.rank_of(name),
        "lora_alpha": config.alpha_of(name),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "dora_simple": config.dora_simple,
    }
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding.from_embedding(module, **options)
    options |= {"use_lora_fa": config.use_lora_fa, "lora_bias": config.lora_bias}
    if isinstance(module, CONVOLUTIONS):
        return LoRAConv.from_conv(module, **options)
    assert isinstance(module, nn.Linear)
    keep = config.dora_keep_output
    if isinstance(keep, list):
        keep = names_module(keep, name)
    # what the model keeps anyway it would save nothing to compute again; what comes of a dropped
    # input it does not keep
    keep = keep or (is_kept(name) and config.lora_dropout == 0.0)
    return LoRALinear.from_linear(
        module, **options, dora_keep_output=keep, init_lora_weights=not config.pissa
    )


def _projection(config: VeRAConfig, modules: list[nn.Module]) -> VeRAProjection:
    """The one for the largest of these linears, on the first one's device."""
    weights = [weight for module in modules if isinstance(weight := module.weight, nn.Parameter)]
    return VeRAProjection(
        config.r,
        max(weight.shape[1] for weight in weights),
        max(weight.shape[0] for weight in weights),
        config.projection_prng_key,
        persistent=config.save_projection,
        device=weights[0].device,
    )
