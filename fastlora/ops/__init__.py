"""The ground floor: the mathematics, as differentiable functions on tensors."""

from fastlora.ops.adapter_linear import adapter_linear
from fastlora.ops.explain import OPERATIONS, explain

__all__ = ["OPERATIONS", "adapter_linear", "explain"]
