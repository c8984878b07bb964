"""The methods: what a paper adds around the layers. One file a method."""

from fastlora.methods.adalora import AdaLoRA, orthogonal_regulariser
from fastlora.methods.lora_fa import LoRAFA
from fastlora.methods.lora_pro import LoRAPro

__all__ = ["AdaLoRA", "LoRAFA", "LoRAPro", "orthogonal_regulariser"]
