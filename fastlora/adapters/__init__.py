"""What one does with the adapters of a whole model: see, inject, merge, save, load."""

from fastlora.adapters.checkpoint import load_adapter, read_config, save_adapter
from fastlora.adapters.config import LoRAConfig
from fastlora.adapters.inject import inject, unload
from fastlora.adapters.merge import disabled, merge, unmerge
from fastlora.adapters.report import Report, Row
from fastlora.adapters.view import AdapterLayer, layers

__all__ = [
    "AdapterLayer",
    "LoRAConfig",
    "Report",
    "Row",
    "disabled",
    "inject",
    "layers",
    "load_adapter",
    "merge",
    "read_config",
    "save_adapter",
    "unload",
    "unmerge",
]
