"""The methods: what a paper adds around the layers. One file a method."""

from fastlora.methods.adalora import AdaLoRA, orthogonal_regulariser
from fastlora.methods.lora_fa import LoRAFA
from fastlora.methods.lora_ga import LoRAGAConfig, lora_ga
from fastlora.methods.lora_pro import LoRAPro
from fastlora.methods.qpissa import QPiSSA, qpissa

__all__ = [
    "AdaLoRA",
    "LoRAFA",
    "LoRAGAConfig",
    "LoRAPro",
    "QPiSSA",
    "lora_ga",
    "orthogonal_regulariser",
    "qpissa",
]
