"""The modules: layers that hold adapter parameters and call the operations."""

from fastlora.nn.adalora_linear import AdaLoRALinear
from fastlora.nn.adapted import AdaptedLayer
from fastlora.nn.lora_conv import LoRAConv
from fastlora.nn.lora_embedding import LoRAEmbedding
from fastlora.nn.lora_linear import LoRALinear
from fastlora.nn.tied_head import TiedHead
from fastlora.nn.vera_linear import VeRALinear, VeRAProjection

__all__ = [
    "AdaLoRALinear",
    "AdaptedLayer",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALinear",
    "TiedHead",
    "VeRALinear",
    "VeRAProjection",
]
