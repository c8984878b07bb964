"""fastlora: every LoRA-family method at nearly the cost of the frozen layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastlora import adapters, nn, ops
from fastlora._version import __version__
from fastlora.adapters import (
    AdaLoRAConfig,
    LoRAConfig,
    Report,
    VeRAConfig,
    disabled,
    inject,
    load_adapter,
    merge,
    resize,
    save_adapter,
    spectra,
    unload,
    unmerge,
)
from fastlora.ops import adapter_linear, explain
from fastlora.ops.backend import BackendError, FallbackWarning, use_backend

if TYPE_CHECKING:
    from fastlora import methods as methods
    from fastlora import optim as optim
    from fastlora.integrations.peft import accelerate as accelerate
    from fastlora.integrations.peft import restore as restore

__all__ = [
    "AdaLoRAConfig",
    "BackendError",
    "FallbackWarning",
    "LoRAConfig",
    "Report",
    "VeRAConfig",
    "__version__",
    "adapter_linear",
    "adapters",
    "disabled",
    "explain",
    "inject",
    "load_adapter",
    "merge",
    "nn",
    "ops",
    "resize",
    "save_adapter",
    "spectra",
    "unload",
    "unmerge",
    "use_backend",
]


_MODULES = ("methods", "optim")
_OF_PEFT = ("accelerate", "restore")


def __getattr__(name: str) -> Any:
    """What is brought in only when it is used: ``accelerate`` and ``restore`` need peft."""
    if name in _MODULES:
        return import_module(f"fastlora.{name}")
    if name in _OF_PEFT:
        try:
            from fastlora.integrations import peft
        except ImportError as error:
            raise ImportError(
                f"fastlora.{name} works on peft models and needs peft: pip install 'fastlora[peft]'"
            ) from error
        return getattr(peft, name)
    raise AttributeError(f"module 'fastlora' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_OF_PEFT})
