"""The linear layers of the family: each says which operands it brings to ``adapter_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nn.adapted import AdaptedLayer, cannot_adapt, refuse
from fastlora.nn.compute import compute
from fastlora.nn.group import InputGroup
from fastlora.nn.plain import added_behaviour
from fastlora.ops.adapter_group import Member


class AdaptedLinear(AdaptedLayer):
    """A linear layer y = g ∘ (x Wᵀ + s · b ∘ (((drop(x) Aᵀ) ∘ d) Bᵀ)) + bias, base frozen.

    A subclass names its operands in ``operands``; everything else follows from them. ``group`` and
    ``slot``: the layers that read the same input, if ``inject`` found any.
    """

    in_features: int
    out_features: int
    group: InputGroup | None = None
    slot: int = 0

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__(weight, bias)
        self.out_features, self.in_features = weight.shape

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.group is not None:
            self.group.join(self, self.slot)

    def operands(self, dropout: bool) -> Member | None:
        """What the layer computes with now, dropout left out if not asked for; None for a layer
        without ranks, which computes its base."""
        raise NotImplementedError

    def base_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def adapted_forward(self, x: Tensor) -> Tensor:
        if self.group is not None:
            y = self.group.result(self, self.slot, x)
            if y is not None:
                return y
        member = self.operands(self.training)
        return self.base_forward(x) if member is None else compute(x, member)

    def member(self, x: Tensor) -> Member | None:
        """See ``nn.group.Joining``."""
        if (
            self.merged
            or not self.enabled
            or added_behaviour(self)
            or x.device != self.weight.device
        ):
            return None
        return self.operands(self.training)

    def settings(self) -> tuple[Any, ...]:
        """See ``nn.group.Joining``."""
        # resize gives parameters other memory
        tensors = [(id(t), t.data_ptr(), t.requires_grad) for t in self._own()]
        dropout = getattr(self, "lora_dropout", 0.0), getattr(self, "vera_dropout", 0.0)
        numbers = getattr(self, "scaling", 1.0), *dropout
        return self.training, self.merged, self.enabled, id(self.weight), numbers, tensors

    def _own(self) -> list[Tensor]:
        """``tensors`` without their names, and the base's: asked for at every call."""
        found: list[Tensor] = []
        for module in (self, *self._modules.values()):
            if module is None:
                continue
            if module is not self and module._modules:  # parametrised: it computes what it gives
                return list(self.tensors().values())
            found += [tensor for tensor in module._parameters.values() if tensor is not None]
        return found

    def plain(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.register_parameter("weight", self.weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _facts(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    def _delta(self, dtype: torch.dtype) -> Tensor:
        member = self.operands(dropout=False)
        if member is None:
            return torch.zeros_like(self.weight, dtype=dtype)
        left, right = member.lora_B.to(dtype), member.lora_A.to(dtype)
        if member.adapter_scale is not None:
            left = left * member.adapter_scale.to(dtype)[:, None]
        if member.mid_scale is not None:
            left = left * member.mid_scale.to(dtype)
        return (left @ right).mul_(member.scaling)

    def _scale(self, dtype: torch.dtype) -> Tensor | None:
        member = self.operands(dropout=False)
        if member is None or member.out_scale is None:
            return None
        return member.out_scale.to(dtype)[:, None]


def parameters_of(linear: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """(weight, bias) of a linear that can be adapted; raises as ``LoRALinear.from_linear`` does."""
    refuse(linear, cannot_adapt(linear, nn.Linear), nn.Linear)
    weight = linear._parameters["weight"]
    assert weight is not None  # cannot_adapt has seen it
    return weight, linear._parameters["bias"]
