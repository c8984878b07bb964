"""Put LoRA layers into a model that has none, and take them out again."""

from __future__ import annotations

from torch import nn

from fastlora.adapters.config import LoRAConfig
from fastlora.adapters.report import Report, Row
from fastlora.adapters.targets import find_targets
from fastlora.adapters.view import is_peft_layer, unwrap
from fastlora.nn.lora_linear import LoRALinear


def inject(model: nn.Module, config: LoRAConfig) -> Report:
    """Replace the linear layers ``config`` names by ``LoRALinear``, in place, and freeze the rest.

    The new layers hold the old ones' own weights, so this takes no memory beyond the adapters, and
    every key of the base's state dict stays.

    Returns a report of what was adapted and what was not, each with its reason.

    Raises ValueError, before anything has changed, if the configuration matches nothing, names a
    layer that cannot be adapted, or if the model carries an adapter already.
    """
    model = unwrap(model)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            raise ValueError(f"the model has an adapter already (at {name}); one a model")
        if is_peft_layer(module):
            raise ValueError(
                f"the model has a peft adapter already (at {name}); use fastlora.accelerate"
            )
    targets, skipped = find_targets(model, config)
    layers = [  # all are built before any is put in place: building may fail
        LoRALinear.from_linear(
            target.linear,
            config.rank_of(target.name),
            config.alpha_of(target.name),
            config.lora_dropout,
            config.use_rslora,
        )
        for target in targets
    ]
    model.requires_grad_(False)
    report = Report(skipped=skipped)
    for target, layer in zip(targets, layers, strict=True):
        for parent, attribute in target.places:
            setattr(parent, attribute, layer)
        report.fused.append(
            Row(target.name, f"r={layer.r}, scaling={layer.scaling:g}, {layer.weight.dtype}")
        )
    return report


def unload(model: nn.Module) -> None:
    """Put plain ``nn.Linear`` layers back, in place: merged weights stay merged, adapters that are
    not merged are dropped.

    Raises ValueError if the model has no adapter of ours.
    """
    model = unwrap(model)
    replaced: dict[int, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, LoRALinear):
            continue
        if id(module) not in replaced:
            replaced[id(module)] = _plain_linear(module)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replaced[id(module)])
    if not replaced:
        raise ValueError("the model has no fastlora adapter to unload")


def _plain_linear(layer: LoRALinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
    linear.register_parameter("weight", layer.weight)
    linear.register_parameter("bias", layer.bias)
    return linear.train(layer.training)
