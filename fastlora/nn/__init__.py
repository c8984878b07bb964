"""The modules: layers that hold adapter parameters and call the operations."""

from fastlora.nn.lora_linear import LoRALinear

__all__ = ["LoRALinear"]
