"""What every adapted layer has in common: a frozen base, an adapter, and their merging."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.nn.plain import added_behaviour
from fastlora.ops.backend import HALF

FLOATS = (torch.float32, torch.float64, *HALF)

# Where a merge scales by less than this, or by more than its inverse, the base weight is kept to be
# put back: dividing what is merged by such a factor would not return what it was.
_LEAST = 2.0**-6


class AdaptedLayer(nn.Module):
    """A frozen layer with an adapter on it.

    ``weight`` and ``bias`` are the base's own parameters, under its own names. ``merged``: the
    adapter is in the weight. ``enabled``: False computes the base alone. ``config`` is what
    ``inject`` made the layer from (None otherwise).

    A subclass gives ``base_forward``, ``adapted_forward``, ``tensors``, ``plain``, ``summary``
    and ``_delta``, and what else its adapter does to the base: ``_scale``, ``_merged_bias``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    config: Any = None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        assert isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter | None)
        self.merged = False
        self.enabled = True
        self._base: _Base | None = None
        weight.requires_grad_(False)
        self.register_parameter("weight", weight)
        if bias is not None:
            bias.requires_grad_(False)
        self.register_parameter("bias", bias)

    # --- what a subclass gives -----------------------------------------------------------------

    def base_forward(self, x: Tensor) -> Tensor:
        """What the layer computes without its adapter."""
        raise NotImplementedError

    def original_forward(self, x: Tensor) -> Tensor:
        """What the layer computed before it was adapted."""
        return self.base_forward(x)

    def adapted_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def put_back(self) -> None:
        """Give the base weight what the adapter took out of it when it started, if it did."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by the ends of their keys in peft's files."""
        raise NotImplementedError

    def saved(self) -> dict[str, Tensor]:
        """``tensors`` as a file holds them. Raises ValueError where the file would not be the
        layer's adapter."""
        return dict(self.tensors())

    def plain(self) -> nn.Module:
        """A layer of the base's class around the weight and bias as they are now."""
        raise NotImplementedError

    def summary(self) -> str:
        """What a report says of the adapter."""
        raise NotImplementedError

    def _delta(self, dtype: torch.dtype) -> Tensor:
        """What the adapter adds to the weight before any scaling, in the weight's shape."""
        raise NotImplementedError

    def _scale(self, dtype: torch.dtype) -> Tensor | None:
        """DoRA's g in a shape that broadcasts over the weight; None without one."""
        return None

    def _merged_bias(self) -> Tensor | None:
        """The bias with the adapter's own in it; None where the adapter has none."""
        return None

    def cannot_merge(self) -> str | None:
        """Why this adapter cannot be put into the weight, as a sentence; None if it can."""
        return None

    # --- what they share -----------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_forward(x)
        return self.adapted_forward(x) if self.enabled else self.original_forward(x)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Adapted weight less base weight, in the base's shape and dtype (not while merged)."""
        if self.merged:
            raise RuntimeError("the adapter is merged; unmerge it to see what it adds")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta, scale = self._delta(wide), self._scale(wide)
        if scale is not None:
            delta = (self.weight.to(wide) + delta).mul_(scale).sub_(self.weight)
        return delta.to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into the base's weight (and bias), in place; the forward is then the
        base's. A state dict taken while merged holds the merged weight beside the adapter.

        Raises RuntimeError if it is merged already, ValueError if the adapter cannot be merged or
        the result would not be finite; nothing has changed then.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already")
        if reason := self.cannot_merge():
            raise ValueError(f"the adapter cannot be merged: {reason}")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        merged, scale = self._delta(wide).add_(self.weight), self._scale(wide)
        if scale is not None:
            merged.mul_(scale)
        merged, bias = merged.to(self.weight.dtype), self._merged_bias()
        for values in (merged, bias):
            if values is not None and not torch.isfinite(values).all():
                raise ValueError("merging would put non-finite values into the base weight")
        extreme = scale is not None and not ((scale > _LEAST) & (scale < 1 / _LEAST)).all()
        self._base = _Base(
            None if scale is None or extreme else scale,
            self.weight.clone() if extreme else None,
            None if bias is None else self.bias.clone(),  # type: ignore[union-attr]
        )
        self.weight.copy_(merged)
        if bias is not None:
            self.bias.copy_(bias)  # type: ignore[union-attr]
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out again. The weight returns to within a rounding of what it was.

        Raises RuntimeError if it is not merged.
        """
        if not self.merged:
            raise RuntimeError("the adapter is not merged")
        base, device = self._base, self.weight.device
        assert base is not None
        if base.weight is not None:
            self.weight.copy_(base.weight)
        else:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            weight = self.weight.to(wide)
            if base.scale is not None:
                weight = weight / base.scale.to(device)
            self.weight.copy_(weight - self._delta(wide))
        if base.bias is not None:
            self.bias.copy_(base.bias)  # type: ignore[union-attr]
        self.merged, self._base = False, None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._facts().items())

    def _facts(self) -> dict[str, Any]:
        """What the printed layer tells."""
        return {}


class _Base(NamedTuple):
    """What it takes to come back from a merge, beside the adapter itself."""

    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def cannot_adapt(module: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Why an adapted layer cannot stand in for this module, as a sentence; None if it can.

    It must be exactly one of ``kinds`` (a subclass may compute something else), with a plain
    floating weight and neither hooks nor a forward of its own, which would be lost.
    """
    if type(module) not in kinds:
        wanted = " or ".join(f"torch.nn.{kind.__name__}" for kind in kinds)
        return f"it is a {type(module).__name__}, not a {wanted}"
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter:
        return f"its weight is a {type(module.weight).__name__}, not a plain parameter"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, not float32, float64, bfloat16 or float16"
    return added_behaviour(module)


def refuse(module: nn.Module, reason: str | None, *kinds: type[nn.Module]) -> None:
    """If there is a reason, raise TypeError for a module of another class, else ValueError."""
    if reason:
        raise (ValueError if type(module) in kinds else TypeError)(
            f"this layer cannot be adapted: {reason}"
        )


def adapter_dtype_over(base: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """The adapter's dtype over a base: ``wanted``, or float32 over half precision (as in peft).

    Raises TypeError for one that does not go with the base's.
    """
    if wanted is None:
        return torch.float32 if base in HALF else base
    allowed = {base, torch.float32} if base in HALF else {base}
    if wanted not in allowed:
        raise TypeError(
            f"adapter_dtype {wanted} does not go with a base of {base}: it is the base's, or "
            "float32 over a half-precision base"
        )
    return wanted


def check_rank(name: str, r: Any) -> None:
    """Raise ValueError unless r is a whole number of at least 1."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {r!r}")


def check_finite(name: str, value: Any) -> None:
    """Raise ValueError unless value is a finite number, and within a float's range."""
    in_range = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    if not in_range or isinstance(value, bool):
        raise ValueError(f"{name} must be a finite number, not {value!r}")


def check_dropout(name: str, value: Any) -> None:
    """Raise ValueError unless value is a probability in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), not {value!r}")


def check_switch(name: str, value: Any) -> None:
    """Raise ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")
