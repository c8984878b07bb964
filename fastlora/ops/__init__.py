"""The ground floor: the mathematics, as differentiable functions on tensors."""

from fastlora.ops.adapter_group import Member, adapter_group
from fastlora.ops.adapter_linear import adapter_linear
from fastlora.ops.explain import OPERATIONS, explain
from fastlora.ops.weight_norm import WeightNormCache, weight_norm

__all__ = [
    "OPERATIONS",
    "Member",
    "WeightNormCache",
    "adapter_group",
    "adapter_linear",
    "explain",
    "weight_norm",
]
