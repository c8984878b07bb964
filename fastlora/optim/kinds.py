"""The kinds of parameters that Tiger has rates for, found by the type of the module they are in."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

KINDS = ("gamma", "beta", "embedding", "other")

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)


def by_shape(param: Tensor) -> str:
    """The kind where nothing but the tensor is known: "beta" below two axes, else "other"."""
    return "beta" if param.dim() < 2 else "other"


def kinds(model: nn.Module) -> dict[str, str]:
    """{name: kind} of the parameters of ``model`` that are trained.

    "gamma": a norm's weight, "beta": a norm's bias and whatever else has less than two axes,
    "embedding": an ``nn.Embedding``'s weight (of a tied head too), "other": the rest. Classes named
    …Norm…, as transformers', count as norms where their weight has one axis.
    """
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    return {
        name: "embedding" if id(param) in embeddings else _kind(module, leaf, param)
        for name, module, leaf, param in _owned(model)
        if param.requires_grad
    }


def param_groups(
    model: nn.Module,
    *,
    by_name: Mapping[str, str | Mapping[str, Any]] | None = None,
    **options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Groups for ``Tiger`` (or ``Lion``) of all parameters that are trained, one a kind.

    Args:
        by_name: {pattern: kind, or options of a group of its own}; a pattern is a shell's, as
            "*.lm_head.*", and the first that matches a name decides. Options may have a "kind";
            without it each parameter keeps its own.
        options: per kind, what its group has, as ``embedding={"lazy_rows": True}``,
            ``embedding={"algorithm": "adamw", "lr": 1e-3}`` or ``other={"weight_decay": 0.1}``.

    Raises ValueError for a kind there is not, a pattern that matches nothing, and a model with
    nothing to train.
    """
    for kind in options:
        _check_kind(kind)
    found = kinds(model)
    if not found:
        raise ValueError("the model has no parameters to be trained")
    named = dict(model.named_parameters())
    unused = set(by_name or {})
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, kind in found.items():
        chosen, own = "", dict(options.get(kind, {}))
        for pattern, what in (by_name or {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                unused.discard(pattern)
                if isinstance(what, str):
                    kind = what
                    own = dict(options.get(kind, {}))
                else:
                    chosen, own = pattern, dict(what)
                    kind = own.pop("kind", kind)
                _check_kind(kind)
                break
        key = (chosen, kind)
        groups.setdefault(key, {"params": [], "kind": kind, **own})["params"].append(
            (name, named[name])
        )
    if unused:
        raise ValueError(f"no trained parameter has a name like '{min(unused)}'")
    return list(groups.values())


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            if id(param) not in seen:
                seen.add(id(param))
                yield (f"{prefix}.{leaf}" if prefix else leaf), module, leaf, param


def _kind(module: nn.Module, leaf: str, param: Tensor) -> str:
    norm = isinstance(module, _NORMS) or "Norm" in type(module).__name__
    if norm and leaf in ("weight", "scale", "gamma") and param.dim() == 1:
        return "gamma"
    return by_shape(param)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"there is no kind '{kind}'; there are {', '.join(KINDS)}")
