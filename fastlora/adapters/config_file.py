"""adapter_config.json: read into a configuration of ours, and described so that peft reads it."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.adapters.config import (
    CONFIGS,
    AdaLoRAConfig,
    AdapterConfig,
    LoRAConfig,
    VeRAConfig,
    names_module,
)
from fastlora.adapters.view import plain_modules
from fastlora.nn import AdaLoRALinear, AdaptedLayer, LoRALinear, VeRALinear

CONFIG_NAME = "adapter_config.json"

# Options of ours that say how an adapter is trained, not what it computes: peft has no such fields.
_UNWRITTEN = {"dora_simple", "dora_keep_output", "use_lora_fa"}
# An option of ours that a file does not bring along: its tensors replace whatever a start gives.
_UNREAD = {"init_lora_weights"}
# Entries of a configuration that say nothing about how the layers compute.
_DESCRIPTIVE = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "init_lora_weights",
    "init_weights",
}
# Entries of LoRA's that peft's other configurations inherit and do not use.
_UNUSED = {"ADALORA": {"r"}}
# Initialisations that leave the base weight alone, so that the factors are all there is to load.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """The configuration in ``folder``.

    Raises FileNotFoundError where there is none, ValueError where it is unreadable, of a kind or
    with an option that only peft has.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; is it an adapter's folder?")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold an object, not a {type(raw).__name__}")
    kinds = {kind.peft_type: kind for kind in CONFIGS}
    peft_type = raw.get("peft_type")
    kind = kinds.get(peft_type) if isinstance(peft_type, str) else None
    if kind is None:
        raise ValueError(
            f"{path}: peft_type {peft_type!r} is none of {', '.join(kinds)}; load it in peft"
        )
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights={raw['init_lora_weights']!r} belongs with base weights or "
            "layers changed to fit it; load the adapter with peft, or save its difference form"
        )
    known = {f.name for f in fields(kind)} - _UNWRITTEN - _UNREAD
    silent = known | _DESCRIPTIVE | _UNUSED.get(kind.peft_type, set())
    for option, value in raw.items():
        if option not in silent and value not in (None, False, "none", [], {}, ""):
            raise ValueError(
                f"{path}: {option}={value!r} is an option fastlora does not have; load the adapter "
                "with peft and call fastlora.accelerate"
            )
    options = {name: raw[name] for name in known if raw.get(name) is not None}
    if "target_modules" not in options:
        raise ValueError(f"{path}: target_modules is missing")
    try:
        return kind(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def describe(model: nn.Module, found: list[tuple[str, AdaptedLayer]]) -> dict[str, Any]:
    """The configuration that gives just these layers when peft reads it.

    Raises ValueError where no one configuration does.
    """
    kinds = {_kind(layer) for _, layer in found}
    if len(kinds) > 1:
        raise ValueError(f"the model mixes adapters of {' and '.join(sorted(kinds))}")
    (kind,) = kinds
    own = {"LORA": _lora, "ADALORA": _adalora, "VERA": _vera}[kind](found)
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "target_modules": _shortest_targets(model, {name for name, _ in found}),
        "exclude_modules": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    } | own


def settings(layer: AdaptedLayer) -> dict[str, Any]:
    """What a file's configuration must say alike for its tensors to mean the same here."""
    if isinstance(layer, VeRALinear):
        return {"r": layer.r, "projection_prng_key": layer.projection.projection_prng_key}
    if isinstance(layer, AdaLoRALinear):
        return {
            "init_r": layer.init_r,
            "lora_alpha": _adalora_alpha(layer),
            "rank_mask": list(layer.rank_mask),
        }
    own: Any = layer
    return {
        "r": own.r,
        "lora_alpha": float(own.lora_alpha),
        "use_rslora": own.use_rslora,
        "use_dora": own.lora_magnitude_vector is not None,
        "lora_bias": "lora_B.bias" in layer.tensors(),
    }


def settings_of(config: AdapterConfig, name: str) -> dict[str, Any]:
    """``settings`` of the layer that ``config`` would put at this path."""
    if isinstance(config, VeRAConfig):
        return {"r": config.r, "projection_prng_key": config.projection_prng_key}
    if isinstance(config, AdaLoRAConfig):
        return {
            "init_r": config.init_r,
            "lora_alpha": _adalora_alpha(config),
            "rank_mask": config.mask_of(name) or [True] * config.init_r,
        }
    assert isinstance(config, LoRAConfig)
    return {
        "r": config.rank_of(name),
        "lora_alpha": float(config.alpha_of(name)),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
    }


def _adalora_alpha(of: AdaLoRALinear | AdaLoRAConfig) -> float:
    """α with init_r in the place of one that is not above 0. peft puts a layer's rank there, which
    in a file with a rank_pattern is no longer the initial one that the layer was trained with."""
    return float(of.lora_alpha if of.lora_alpha > 0 else of.init_r)


def _kind(layer: AdaptedLayer) -> str:
    if isinstance(layer, VeRALinear):
        return "VERA"
    return "ADALORA" if isinstance(layer, AdaLoRALinear) else "LORA"


def _lora(found: list[tuple[str, Any]]) -> dict[str, Any]:
    written = {name: _written(layer) for name, layer in found}
    r = _most_common(rank for rank, _ in written.values())
    alpha = _most_common(alpha for _, alpha in written.values())
    seen = [settings(layer) for _, layer in found]
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": _most_common(layer.lora_dropout for _, layer in found),
        "rank_pattern": {_only(name): own for name, (own, _) in written.items() if own != r},
        "alpha_pattern": {_only(name): own for name, (_, own) in written.items() if own != alpha},
        "init_lora_weights": True,
        **{name: _same(name, seen) for name in ("use_rslora", "use_dora", "lora_bias")},
    }


def _written(layer: Any) -> tuple[int, float]:
    """(r, α) of what ``saved`` gives: of more ranks after PiSSA or LoRA-GA, with the same s."""
    if not isinstance(layer, LoRALinear) or layer.start is None:
        return layer.r, layer.lora_alpha
    rank = layer.saved_rank()
    ratio = rank / layer.r
    return rank, layer.lora_alpha * (math.sqrt(ratio) if layer.use_rslora else ratio)


def _adalora(found: list[tuple[str, Any]]) -> dict[str, Any]:
    config = found[0][1].config or AdaLoRAConfig(total_step=1)
    seen = [settings(layer) for _, layer in found]
    schedule = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
    # what methods.AdaLoRA has masked for good is not saved
    masks = {f"{name}.lora_E": list(layer.kept or layer.rank_mask) for name, layer in found}
    cut = not all(all(mask) for mask in masks.values())
    return {
        **{name: getattr(config, name) for name in schedule},
        "total_step": config.total_step or config.tinit + config.tfinal + 1,
        "init_r": _same("init_r", seen),
        "lora_alpha": _same("lora_alpha", seen),
        "lora_dropout": _most_common(layer.lora_dropout for _, layer in found),
        "rank_pattern": masks if cut else None,
        "init_lora_weights": True,
    }


def _vera(found: list[tuple[str, Any]]) -> dict[str, Any]:
    config = found[0][1].config or VeRAConfig()
    seen = [settings(layer) for _, layer in found]
    if len({id(layer.projection) for _, layer in found}) > 1:
        raise ValueError("the VeRA layers do not share one projection: peft has no such file")
    return {
        "r": _same("r", seen),
        "projection_prng_key": _same("projection_prng_key", seen),
        "save_projection": config.save_projection,
        "vera_dropout": _most_common(layer.vera_dropout for _, layer in found),
        "d_initial": _most_common(layer.d_initial for _, layer in found),
        "init_weights": True,
    }


def _same(name: str, seen: list[dict[str, Any]]) -> Any:
    values = {each[name] for each in seen}
    if len(values) > 1:
        raise ValueError(f"the layers differ in {name}: peft has no such file")
    return values.pop()


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


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
