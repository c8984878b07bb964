"""Adapters on disk, in peft's format: adapter_config.json and adapter_model.safetensors.

A file is believed only after everything about it has been checked; until then no weight changes.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlora.adapters.config import LoRAConfig
from fastlora.adapters.inject import inject
from fastlora.adapters.report import Report, Row
from fastlora.adapters.targets import find_targets, names_module
from fastlora.adapters.view import (
    PEFT_PREFIX,
    AdapterLayer,
    is_peft_layer,
    layers,
    plain_modules,
    unwrap,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_OURS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
)
# Entries of a configuration that say nothing about how the layers compute.
_DESCRIPTIVE = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
)
# Initialisations that leave the base weight alone, so that the factors are all there is to load.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model's adapter to ``folder`` so that both fastlora and peft can load it.

    Files are written beside their places and then renamed, so that a crash leaves old ones whole.

    Raises ValueError if the model has no adapter of ours or a non-finite one, FileExistsError if
    ``folder`` is a file.
    """
    model = unwrap(model)
    found = _our_layers(model)
    if not found:
        raise ValueError("the model has no fastlora adapter to save; peft saves its own")
    tensors: dict[str, Tensor] = {}
    for layer in found:
        for part, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            key = _key(layer.name, part)
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{key} holds non-finite values; nothing was written")
            tensors[key] = parameter.detach().cpu().contiguous()
    config = _describe(model, found)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; an adapter is saved into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        save_file(tensors, Path(beside) / WEIGHTS_NAME, metadata={"format": "pt"})
        (Path(beside) / CONFIG_NAME).write_text(text, encoding="utf-8")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(beside) / name, folder / name)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Report:
    """Load an adapter that fastlora or peft saved: inject it, or fill the one that is there.

    Raises, before anything has changed: FileNotFoundError for a missing folder or file; ValueError
    for a file that is truncated or no LoRA adapter, for options that only peft has, and for keys
    that are missing, left over, of another shape or not finite (the message names them).
    """
    folder, model = Path(folder), unwrap(model)
    config = read_config(folder)
    tensors = _read_weights(folder)
    found = _our_layers(model)
    if found:
        report = _check_same(found, config)
        shapes = {layer.name: (layer.lora_A.shape, layer.lora_B.shape) for layer in found}
    else:
        if any(is_peft_layer(module) for module in model.modules()):
            raise ValueError("the model has peft layers; load the adapter with peft's own methods")
        report = None
        targets, _ = find_targets(model, config)
        shapes = {}
        for name, linear, _ in targets:
            r = config.rank_of(name)
            n, k = linear.weight.shape
            shapes[name] = (torch.Size((r, k)), torch.Size((n, r)))
    _drop_base_weights(model, tensors, folder)
    _check_tensors(shapes, tensors, folder)
    if report is None:
        report = inject(model, config)
        found = _our_layers(model)
    with torch.no_grad():
        for layer in found:
            layer.lora_A.copy_(tensors[_key(layer.name, "lora_A")])
            layer.lora_B.copy_(tensors[_key(layer.name, "lora_B")])
    return report


def read_config(folder: str | os.PathLike[str]) -> LoRAConfig:
    """The configuration in ``folder``. Raises as ``load_adapter`` does."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; is it an adapter's folder?")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold an object, not a {type(raw).__name__}")
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {raw.get('peft_type')!r} is not LORA; load it in peft")
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights={raw['init_lora_weights']!r} belongs with base weights or "
            "layers changed to fit it; load the adapter with peft, or save its difference form"
        )
    for option, value in raw.items():
        known = option in _OURS or option in _DESCRIPTIVE or option == "init_lora_weights"
        if not known and value not in (None, False, "none", [], {}, ""):
            raise ValueError(
                f"{path}: {option}={value!r} is an option fastlora does not have; load the adapter "
                "with peft and call fastlora.accelerate"
            )
    options = {k: raw[k] for k in _OURS if raw.get(k) is not None}
    if "target_modules" not in options:
        raise ValueError(f"{path}: target_modules is missing")
    try:
        return LoRAConfig(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        hint = " (adapter_model.bin is a pickle, which is not opened)" if pickled.exists() else ""
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_NAME}{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _our_layers(model: nn.Module) -> list[AdapterLayer]:
    return [layer for layer in layers(model) if not is_peft_layer(layer.module)]


def _key(name: str, part: str) -> str:
    return f"{PEFT_PREFIX}{name}.{part}.weight"


def _drop_base_weights(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Take out the base weights that peft stores with adapted embeddings; they must be ours."""
    base = dict(model.named_parameters(remove_duplicate=False))
    for key in list(tensors):
        own = base.get(key.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."))
        if own is None or ".lora_" in key:
            continue
        if not torch.equal(tensors.pop(key), own.detach().cpu()):
            raise ValueError(
                f"{folder / WEIGHTS_NAME} holds {key}, which differs from the model's own; "
                "load the adapter with peft and call fastlora.accelerate"
            )


def _check_tensors(
    shapes: dict[str, tuple[torch.Size, torch.Size]], tensors: dict[str, Tensor], folder: Path
) -> None:
    expected = {}
    for name, (shape_A, shape_B) in shapes.items():
        expected[_key(name, "lora_A")] = shape_A
        expected[_key(name, "lora_B")] = shape_B
    for what, keys in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("holds, without a place in this model,", sorted(tensors.keys() - expected.keys())),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{folder / WEIGHTS_NAME} {what} {keys[0]}{more}")
    for key, shape in expected.items():
        tensor = tensors[key]
        if tensor.shape != shape:
            raise ValueError(
                f"{key} has shape {list(tensor.shape)}; this model takes {list(shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{key} holds {tensor.dtype}, not floating numbers")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds non-finite values")


def _check_same(found: list[AdapterLayer], config: LoRAConfig) -> Report:
    """The adapter in place must compute with the file's ranks and scalings."""
    report = Report()
    for layer in found:
        if layer.merged:
            raise ValueError(f"{layer.name} is merged; unmerge the model before loading")
        mine = (layer.r, float(layer.lora_alpha), layer.use_rslora)
        file = (
            config.rank_of(layer.name),
            float(config.alpha_of(layer.name)),
            config.use_rslora,
        )
        if mine != file:
            raise ValueError(
                f"{layer.name} has (r, lora_alpha, use_rslora) = {mine}, the file has {file}; "
                "load it into a model without adapter"
            )
        report.fused.append(Row(layer.name, f"r={layer.r}, values loaded"))
        if layer.lora_dropout != config.lora_dropout:
            kept = f"lora_dropout stays {layer.lora_dropout}, the file says {config.lora_dropout}"
            report.skipped.append(Row(layer.name, kept))
    return report


def _describe(model: nn.Module, found: list[AdapterLayer]) -> dict[str, Any]:
    """The configuration that gives just these layers when peft reads it."""
    if len({layer.use_rslora for layer in found}) > 1:
        raise ValueError("some layers use rsLoRA's scaling and some do not: peft has no such file")
    r = _most_common(layer.r for layer in found)
    alpha = _most_common(layer.lora_alpha for layer in found)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": _most_common(layer.lora_dropout for layer in found),
        "target_modules": _shortest_targets(model, {layer.name for layer in found}),
        "exclude_modules": None,
        "use_rslora": found[0].use_rslora,
        "rank_pattern": {_only(layer.name): layer.r for layer in found if layer.r != r},
        "alpha_pattern": {
            _only(layer.name): layer.lora_alpha for layer in found if layer.lora_alpha != alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_bias": False,
        "modules_to_save": None,
        "use_dora": False,
    }


def _only(name: str) -> str:
    """A pattern's key that means this path and no longer one that ends in it."""
    return "^" + re.escape(name)


def _shortest_targets(model: nn.Module, adapted: set[str]) -> list[str] | str:
    """target_modules that mean just these: last parts, else whole paths, else one expression."""
    # inside an adapted layer the paths differ between the injected model and the plain one
    others = [
        name
        for name, _ in plain_modules(model)
        if name not in adapted and name.rpartition(".")[0] not in adapted
    ]
    for entries in ({name.rpartition(".")[2] for name in adapted}, adapted):
        if not any(names_module(sorted(entries), name) for name in others):
            return sorted(entries)
    return "|".join(re.escape(name) for name in sorted(adapted))


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]
