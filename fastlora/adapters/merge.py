"""Merge, unmerge and switch off the adapters of a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastlora.nn import AdaptedLayer


def merge(model: nn.Module) -> None:
    """Put every adapter into its base weight, in place; all of them or, on an error, none.

    Raises ValueError if the model has no adapter of ours, if an adapter holds non-finite values
    or has no place in its base, or if a base weight, or a bias that is to change, is tied to
    another module (which would change with it); RuntimeError if a layer is merged already.
    """
    layers = _adapted(model)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers:
        if layer.merged:
            raise RuntimeError(f"{name} is merged already")
        if reason := layer.cannot_merge():
            raise ValueError(f"the adapter of {name} cannot be merged: {reason}")
        tensors = layer.tensors()
        changed = ("weight", "bias") if "lora_B.bias" in tensors else ("weight",)
        for part in changed:
            if len(tied := owners[id(getattr(layer, part))]) > 1:
                raise ValueError(f"{name} shares its {part} with {', '.join(set(tied) - {name})}")
        for tensor in tensors.values():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"the adapter of {name} holds non-finite values")
    done: list[AdaptedLayer] = []
    try:
        for _, layer in layers:
            layer.merge()
            done.append(layer)
    except BaseException:
        for layer in reversed(done):
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Undo ``merge``: every base weight returns to within a rounding of what it was.

    Raises ValueError if the model has no adapter of ours, RuntimeError if a layer is not merged.
    """
    layers = _adapted(model)
    for name, layer in layers:
        if not layer.merged:
            raise RuntimeError(f"{name} is not merged")
    for _, layer in layers:
        layer.unmerge()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the context the model computes as its base does.

    Raises ValueError if the model has no adapter of ours, RuntimeError if it is merged.
    """
    layers = _adapted(model)
    for name, layer in layers:
        if layer.merged:
            raise RuntimeError(f"{name} is merged; unmerge the model to see it without adapter")
    before = [layer.enabled for _, layer in layers]
    for _, layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for (_, layer), enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _adapted(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLayer)]
    if not found:
        raise ValueError(
            "the model has no fastlora adapter; a peft model has methods of its own for this"
        )
    return found
