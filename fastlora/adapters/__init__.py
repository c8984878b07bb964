"""What one does with the adapters of a whole model: see, inject, merge, resize, save, load."""

from fastlora.adapters.checkpoint import load_adapter, save_adapter
from fastlora.adapters.config import AdaLoRAConfig, AdapterConfig, LoRAConfig, VeRAConfig
from fastlora.adapters.config_file import read_config
from fastlora.adapters.inject import inject, unload
from fastlora.adapters.merge import disabled, merge, unmerge
from fastlora.adapters.report import Report, Row
from fastlora.adapters.resize import resize, spectra
from fastlora.adapters.view import AdapterLayer, layers

__all__ = [
    "AdaLoRAConfig",
    "AdapterConfig",
    "AdapterLayer",
    "LoRAConfig",
    "Report",
    "Row",
    "VeRAConfig",
    "disabled",
    "inject",
    "layers",
    "load_adapter",
    "merge",
    "read_config",
    "resize",
    "save_adapter",
    "spectra",
    "unload",
    "unmerge",
]
