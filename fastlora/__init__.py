"""fastlora: every LoRA-family method at nearly the cost of the frozen layer."""

from fastlora._version import __version__
from fastlora.ops.adapter_linear import adapter_linear
from fastlora.ops.backend import BackendError, FallbackWarning, use_backend
from fastlora.ops.explain import explain

__all__ = [
    "BackendError",
    "FallbackWarning",
    "__version__",
    "adapter_linear",
    "explain",
    "use_backend",
]
