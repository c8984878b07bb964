"""Which modules of a model a configuration means, and why the others are not meant."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from torch import nn

from fastlora.adapters.config import (
    ALL_LINEAR,
    AdapterConfig,
    LoRAConfig,
    names_module,
    pattern_matches,
)
from fastlora.adapters.kinds import refusal
from fastlora.adapters.report import Row

# Layers a user may have thought of as adaptable; what else a model holds needs no mention.
_KIN = ("Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d")


class Target(NamedTuple):
    """A layer to adapt. ``places`` are all (parent, attribute) pairs that hold it."""

    name: str
    module: nn.Module
    places: list[tuple[nn.Module, str]]


def find_targets(model: nn.Module, config: AdapterConfig) -> tuple[list[Target], list[Row]]:
    """The layers ``config`` names and a row for each kindred layer it does not.

    Raises ValueError where nothing matches (naming near misses), where a name given explicitly
    means a module that cannot be adapted, or where a pattern matches no adapted layer.
    """
    heads = _output_embeddings(model)
    targets: dict[int, Target] = {}
    skipped: list[Row] = []
    refused: list[Row] = []
    seen_entries: set[str] = set()
    for name, module in model.named_modules():
        if not name:
            continue
        named = _named(config.target_modules, name)
        seen_entries.update(named or ())
        # None: "all-linear"
        meant = isinstance(module, nn.Linear) if named is None else bool(named)
        excluding = _named(config.exclude_modules, name) or set()
        seen_entries.update(excluding)
        if meant and excluding:
            skipped.append(Row(name, "named by exclude_modules"))
        elif meant and named is None and id(module) in heads:
            skipped.append(Row(name, "the output embedding, which 'all-linear' leaves out"))
        elif meant and (reason := _refusal(model, config, name, module)):
            (skipped if named is None else refused).append(Row(name, reason))
        elif meant:
            targets[id(module)] = Target(name, module, [])
        elif isinstance(module, nn.Linear) or type(module).__name__ in _KIN:
            kind = "not named by target_modules" if named is not None else "not an nn.Linear"
            skipped.append(Row(name, f"{type(module).__name__}, {kind}"))
    if refused:
        raise ValueError(
            f"target_modules names {refused[0].name}, which cannot be adapted: {refused[0].detail}"
            + (f" (and {len(refused) - 1} more)" if len(refused) > 1 else "")
        )
    if not targets:
        raise ValueError(_nothing_matched(model, config))
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in targets:
            parent, _, attribute = name.rpartition(".")
            targets[id(module)].places.append((model.get_submodule(parent), attribute))
    _check_patterns(config, [target.name for target in targets.values()])
    for option in ("target_modules", "exclude_modules"):
        entries = getattr(config, option)
        for entry in entries if isinstance(entries, list) else ():
            if entry not in seen_entries:
                skipped.append(Row(entry, f"an entry of {option} that matches no module"))
    return list(targets.values()), skipped


def _named(wanted: str | list[str] | None, name: str) -> set[str] | None:
    """The entries of ``wanted`` that mean ``name``; None where wanted is 'all-linear'."""
    if wanted is None:
        return set()
    if isinstance(wanted, str):
        if wanted.lower() == ALL_LINEAR:
            return None
        return {wanted} if re.fullmatch(wanted, name) else set()
    return {entry for entry in wanted if names_module([entry], name)}


def _refusal(model: nn.Module, config: AdapterConfig, name: str, module: nn.Module) -> str | None:
    if reason := refusal(config, name, module):
        return reason
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer's fast path reads the weight past the layer"
    return None


def _output_embeddings(model: nn.Module) -> set[int]:
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return set() if found is None else {id(found)}


def _check_patterns(config: AdapterConfig, names: list[str]) -> None:
    if isinstance(config, LoRAConfig) and isinstance(config.dora_keep_output, list):
        for entry in config.dora_keep_output:
            if not any(names_module([entry], name) for name in names):
                raise ValueError(
                    f"dora_keep_output: '{entry}' names no adapted layer{_near([entry], names)}"
                )
    for option, pattern in config.patterns().items():
        for key in pattern:
            if not any(pattern_matches(key, name) for name in names):
                raise ValueError(f"{option}: '{key}' matches no adapted layer{_near([key], names)}")


def _nothing_matched(model: nn.Module, config: AdapterConfig) -> str:
    linears = [name for name, m in model.named_modules() if type(m) is nn.Linear and name]
    if type(model) is nn.Linear:
        return (
            "the model is itself an nn.Linear, which cannot be replaced inside itself; "
            "use fastlora.nn.LoRALinear.from_linear"
        )
    if any(
        type(module).__name__ == "Conv1D" and _named(config.target_modules, name) != set()
        for name, module in model.named_modules()
    ):
        return (
            "what would be adapted here are Conv1D layers, which fastlora.inject does not replace; "
            "build the model with peft and call fastlora.accelerate"
        )
    if not linears:
        return "the model holds no torch.nn.Linear that could be adapted"
    wanted = config.target_modules
    entries = [wanted] if isinstance(wanted, str) else wanted
    excluded = " after exclude_modules" if config.exclude_modules else ""
    return f"target_modules={wanted!r} matches no nn.Linear{excluded}{_near(entries, linears)}"


def _near(entries: list[str], names: list[str]) -> str:
    last = sorted({name.rpartition(".")[2] for name in names})
    close = [c for e in entries for c in difflib.get_close_matches(e.rpartition(".")[2], last, 2)]
    return f"; did you mean {', '.join(dict.fromkeys(close) or last[:8])}?"
