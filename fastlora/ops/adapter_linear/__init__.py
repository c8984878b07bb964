"""A linear layer with its low-rank adapter, forward and backward."""

from fastlora.ops.adapter_linear.op import BACKENDS, adapter_linear

__all__ = ["BACKENDS", "adapter_linear"]
