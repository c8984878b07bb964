"""Adapters on disk, in peft's format: adapter_config.json and adapter_model.safetensors.

A file is believed only after everything about it has been checked; until then no weight changes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlora.adapters.config import AdapterConfig, VeRAConfig
from fastlora.adapters.config_file import (
    CONFIG_NAME,
    describe,
    read_config,
    settings,
    settings_of,
)
from fastlora.adapters.inject import prepared
from fastlora.adapters.report import Report, Row
from fastlora.adapters.view import PEFT_PREFIX, is_peft_layer, our_layers, unwrap
from fastlora.nn import AdaLoRALinear, AdaptedLayer, VeRALinear

WEIGHTS_NAME = "adapter_model.safetensors"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model's adapter to ``folder`` so that both fastlora and peft can load it.

    After PiSSA or LoRA-GA, which took sB₀A₀ out of the base weights, that is the difference to the
    weights as they were, as an adapter of r more ranks (peft's conversion): A' = [A; A₀],
    B' = [B, −B₀], and α such that s stays. Load it over the original base.

    Files are written beside their places and then renamed, so that a crash leaves old ones whole.

    Raises ValueError if the model has no adapter of ours, a non-finite one, or one that peft has
    no configuration for; FileExistsError if ``folder`` is a file.
    """
    model = unwrap(model)
    found = our_layers(model)
    if not found:
        raise ValueError("the model has no fastlora adapter to save; peft saves its own")
    config = describe(model, found)
    tensors = _places(found, config.get("save_projection", False), saved=True)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds non-finite values; nothing was written")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; an adapter is saved into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    written = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        save_file(written, Path(beside) / WEIGHTS_NAME, metadata={"format": "pt"})
        (Path(beside) / CONFIG_NAME).write_text(text, encoding="utf-8")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(beside) / name, folder / name)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Report:
    """Load an adapter that fastlora or peft saved: inject it, or fill the one that is there.

    Raises, before anything has changed: FileNotFoundError for a missing folder or file; ValueError
    for a file that is truncated or no LoRA, AdaLoRA or VeRA adapter, for options that only peft
    has, for keys that are missing, left over, of another shape or not finite (the message names
    them), and for a model on the meta device.
    """
    folder, model = Path(folder), unwrap(model)
    config = read_config(folder)
    tensors = _read_weights(folder)
    found = our_layers(model)
    if not found and any(is_peft_layer(module) for module in model.modules()):
        raise ValueError("the model has peft layers; load the adapter with peft's own methods")
    report = _check_same(found, config) if found else None
    with nullcontext() if found else prepared(model, config) as plan:
        wanted = list(plan.layers.items()) if plan else found
        _drop_base_weights(model, tensors, folder)
        places = _places(wanted, isinstance(config, VeRAConfig) and config.save_projection)
        _drop_unread_projections(config, tensors, places)
        _check_tensors(places, tensors, folder)
        if plan is not None:
            report = plan.place()
        with torch.no_grad():
            for key, place in places.items():
                place.copy_(tensors[key])
    for _, layer in wanted:
        if isinstance(layer, AdaLoRALinear):
            layer.kept = None  # that was of the values before
    assert report is not None
    return report


def _places(
    found: Iterable[tuple[str, AdaptedLayer]], projections: bool, saved: bool = False
) -> dict[str, Tensor]:
    """The tensors of an adapter by their keys in a file, or what the file is to hold of them."""
    places: dict[str, Tensor] = {}
    for name, layer in found:
        try:
            parts = layer.saved() if saved else layer.tensors()
        except ValueError as error:
            raise ValueError(f"{name} cannot be saved: {error}") from error
        for part, tensor in parts.items():
            places[f"{PEFT_PREFIX}{name}.{part}"] = tensor
        if projections and isinstance(layer, VeRALinear):  # one for all of them
            places["base_model.vera_A"] = layer.projection.vera_A
            places["base_model.vera_B"] = layer.projection.vera_B
    return places


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


def _drop_base_weights(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Take out the base weights that peft stores with adapted embeddings; they must be ours."""
    base = dict(model.named_parameters(remove_duplicate=False))
    for key in list(tensors):
        own = base.get(key.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."))
        if own is None or ".lora_" in key or ".vera_" in key:
            continue
        if not torch.equal(tensors.pop(key), own.detach().cpu()):
            raise ValueError(
                f"{folder / WEIGHTS_NAME} holds {key}, which differs from the model's own; "
                "load the adapter with peft and call fastlora.accelerate"
            )


def _drop_unread_projections(
    config: AdapterConfig, tensors: dict[str, Tensor], places: dict[str, Tensor]
) -> None:
    """save_projection=False says that the key is to be believed, not the file (as in peft)."""
    if isinstance(config, VeRAConfig) and not config.save_projection:
        for key in ("base_model.vera_A", "base_model.vera_B"):
            if key not in places:
                tensors.pop(key, None)


def _check_tensors(places: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    for what, keys in (
        ("lacks", sorted(places.keys() - tensors.keys())),
        ("holds, without a place in this model,", sorted(tensors.keys() - places.keys())),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{folder / WEIGHTS_NAME} {what} {keys[0]}{more}")
    for key, place in places.items():
        tensor = tensors[key]
        if place.is_meta:
            raise ValueError(
                f"{key} has no memory to be loaded into: the model is on the meta device"
            )
        if tensor.shape != place.shape:
            raise ValueError(
                f"{key} has shape {list(tensor.shape)}; this model takes {list(place.shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{key} holds {tensor.dtype}, not floating numbers")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds non-finite values")


def _check_same(found: list[tuple[str, AdaptedLayer]], config: AdapterConfig) -> Report:
    """The adapter in place must be of the file's kind, with its ranks and scalings."""
    report = Report()
    for name, layer in found:
        if layer.merged:
            raise ValueError(f"{name} is merged; unmerge the model before loading")
        if getattr(layer, "start", None) is not None:
            raise ValueError(
                f"{name}'s base weight is what its start (PiSSA or LoRA-GA) left of it, and files "
                "are made for the original; load it into a model without adapter"
            )
        mine, file = settings(layer), settings_of(config, name)
        if mine.keys() != file.keys():
            raise ValueError(
                f"{name} is a {type(layer).__name__}, the file is of {config.peft_type}; load it "
                "into a model without adapter"
            )
        if differ := [option for option in mine if mine[option] != file[option]]:
            here, there = (", ".join(f"{o}={of[o]}" for o in differ) for of in (mine, file))
            raise ValueError(
                f"{name} has {here}, the file has {there}; load it into a model without adapter"
            )
        report.fused.append(Row(name, f"{layer.summary()}, values loaded"))
        for option in ("lora_dropout", "vera_dropout"):
            own, files = getattr(layer, option, None), getattr(config, option, None)
            if own != files:
                kept = f"{option} stays {own}, the file says {files}"
                report.skipped.append(Row(name, kept))
    return report
