"""peft's LoRA ``Embedding``: LoRA and DoRA."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.variants import DoraEmbeddingVariant
from torch import Tensor, nn

from fastlora.integrations.peft import lora, reasons
from fastlora.integrations.peft.fused import Fused
from fastlora.nn.lora_embedding import adapted_embedding


class Sources(NamedTuple):
    """What the layer computes with."""

    adapter: str
    base: nn.Embedding
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    scaling: float


class FusedEmbedding(PeftEmbedding, Fused):
    """peft's LoRA ``Embedding`` by ``adapted_embedding``."""

    peft_class = PeftEmbedding
    forward, _get_name = Fused.forward, Fused._get_name

    @staticmethod
    def never(layer: Any) -> str | None:
        if reason := reasons.of_class(layer, nn.Embedding):
            return reason
        return _of_base(layer.base_layer) or reasons.of_variants(layer, DoraEmbeddingVariant)

    @staticmethod
    def look(layer: Any, x: Tensor | None = None) -> Sources | str:
        modules = layer._modules
        factors_A = modules["lora_embedding_A"]._parameters
        active = reasons.active(layer, factors_A)
        if reason := reasons.of_state(layer, active):
            return reason
        adapter = active[0]
        base = modules["base_layer"]
        if type(base) is not nn.Embedding:
            return f"the base layer is a {type(base).__name__}"
        scaling = layer.scaling[adapter]
        if reason := (
            _of_base(base)
            or _of_tensor_parallelism(layer)
            or reasons.of_parts(base)
            or reasons.of_scaling(scaling)
        ):
            return reason
        weight, magnitude = base.weight, None
        factors = (factors_A[adapter], modules["lora_embedding_B"]._parameters[adapter])
        tensors: tuple[Tensor, ...] = factors
        if adapter in layer.lora_variant:
            variant = layer.lora_variant[adapter]
            if type(variant) is not DoraEmbeddingVariant:
                return f"adapter '{adapter}' computes {type(variant).__name__}"
            dora = modules["lora_magnitude_vector"]._modules[adapter]
            magnitude = dora.weight
            tensors = (*factors, magnitude)
            if reason := reasons.of_dora(dora, weight, factors):
                return reason
        if reason := reasons.of_tensors(weight, tensors, None):
            return reason
        if factors[0].dtype != factors[1].dtype:
            return f"lora_embedding_A is {factors[0].dtype}, lora_embedding_B {factors[1].dtype}"
        if x is not None and x.device != weight.device:
            return "the input is on another device than the base weight"
        return Sources(adapter, base, weight, *factors, magnitude, scaling)

    @staticmethod
    def summary(layer: Any, sources: Sources) -> str:
        adapter, is_dora = sources.adapter, sources.magnitude is not None
        return lora.summary(layer, adapter, is_dora, sources.lora_A, sources.lora_B)

    def fused_forward(self, x: Tensor) -> Tensor | None:
        sources = self.look(self, x)
        if isinstance(sources, str):
            return None
        adapter, base, weight, A, B, magnitude, scaling = sources
        padding, by_frequency = base.padding_idx, base.scale_grad_by_freq
        y = nn.functional.embedding(x, weight, padding, scale_grad_by_freq=by_frequency)
        g = None
        if magnitude is not None:
            g = lora.scale(self._fastlora, adapter, magnitude, weight.t(), A, B, scaling)
        return adapted_embedding(x, y, A, B, scaling, g, padding, by_frequency)


def _of_base(base: nn.Embedding) -> str | None:
    if base.max_norm is not None:
        return "its base has a max_norm, and so rewrites its weight whenever it is called"
    if base.sparse:
        return "the gradients of its base are sparse"
    if "embed_scale" in base.__dict__ or "embed_scale" in base._buffers:
        return "its base scales what it looks up (embed_scale)"
    return None


def _of_tensor_parallelism(layer: Any) -> str | None:
    state = layer.__dict__
    if state.get("tp_layer") is not None or state.get("input_fns") or state.get("output_fns"):
        return "it is split over devices (tensor parallelism)"
    return None
