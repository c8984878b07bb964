"""The linear layers of named models."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """What decides the shapes of a llama-like block. From each model's published config.json."""

    hidden: int
    kv: int  # num_key_value_heads × head_dim
    intermediate: int
    blocks: int
    heads: int  # num_attention_heads × head_dim, the width of q and of o's input

    def layers(self) -> dict[str, tuple[int, int]]:
        """(N, K) by the layer's name; layers of one shape once."""
        named = {
            "q": (self.heads, self.hidden),
            "k": (self.kv, self.hidden),
            "o": (self.hidden, self.heads),
            "gate": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }
        seen: dict[tuple[int, int], str] = {}
        for layer, shape in named.items():
            seen.setdefault(shape, layer)
        return {layer: shape for shape, layer in seen.items()}

    def groups(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """(N of each member, K) of the layers that read one input."""
        return {
            "q,k,v": ((self.heads, self.kv, self.kv), self.hidden),
            "gate,up": ((self.intermediate, self.intermediate), self.hidden),
        }

    def block(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of all seven linears of a block."""
        up = (self.intermediate, self.hidden)
        k = (self.kv, self.hidden)
        return (
            (self.heads, self.hidden), k, k, (self.hidden, self.heads),
            up, up, (self.hidden, self.intermediate),
        )  # fmt: skip


MODELS = {
    "smollm2-135m": Model(576, 192, 1536, 30, 576),
    "smollm2-360m": Model(960, 320, 2560, 32, 960),
    "smollm2-1.7b": Model(2048, 2048, 8192, 24, 2048),
    "qwen2.5-0.5b": Model(896, 128, 4864, 24, 896),
    "qwen2.5-1.5b": Model(1536, 256, 8960, 28, 1536),
    "qwen2.5-7b": Model(3584, 512, 18944, 28, 3584),
    "llama3.2-1b": Model(2048, 512, 8192, 16, 2048),
    "llama3-8b": Model(4096, 1024, 14336, 32, 4096),
    "llama3-70b": Model(8192, 1024, 28672, 80, 8192),
    "mistral-7b": Model(4096, 1024, 14336, 32, 4096),
    "gemma2-9b": Model(3584, 2048, 14336, 42, 4096),
}
