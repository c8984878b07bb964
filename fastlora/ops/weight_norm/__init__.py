"""The row norms of an adapted weight, ‖W + s·BA‖₂ per output, with BA never formed."""

from fastlora.ops.weight_norm.cache import WeightNormCache
from fastlora.ops.weight_norm.contract import FLOOR
from fastlora.ops.weight_norm.op import BACKENDS, weight_norm

__all__ = ["BACKENDS", "FLOOR", "WeightNormCache", "weight_norm"]
