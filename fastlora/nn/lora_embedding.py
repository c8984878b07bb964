"""An embedding with a LoRA or DoRA adapter, as a drop-in for ``torch.nn.Embedding``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nn.adapted import AdaptedLayer, adapter_dtype_over, cannot_adapt, check_switch, refuse
from fastlora.nn.dora import Magnitude
from fastlora.nn.lora_linear import check_hyperparameters, lora_facts, lora_summary


class LoRAEmbedding(AdaptedLayer):
    """y = g ∘ (W[ids] + s · (A[:, ids])ᵀ Bᵀ), g only with ``use_dora``.

    ``weight`` [V, D] is frozen, ``lora_embedding_A`` [r, V] starts at zero and
    ``lora_embedding_B`` [D, r] as N(0, 1): for embeddings the two are the other way round than for
    linears (as in the authors' code and in peft). DoRA's norm runs over the vocabulary, and
    ``lora_magnitude_vector.weight`` has a number for each of the D channels, as in peft.
    ``lora_dropout`` is not applied, as there: ids have nothing to drop. Make one with
    ``from_embedding``.
    """

    def __init__(
        self,
        base: nn.Embedding,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        *,
        use_dora: bool = False,
        dora_simple: bool = True,
    ) -> None:
        check_hyperparameters(r, lora_alpha, lora_dropout)
        for name, switch in (("use_dora", use_dora), ("dora_simple", dora_simple)):
            check_switch(name, switch)
        super().__init__(base.weight, None)
        self.num_embeddings, self.embedding_dim = base.weight.shape
        self.padding_idx = base.padding_idx
        self.scale_grad_by_freq = base.scale_grad_by_freq
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        dtype, device = adapter_dtype_over(base.weight.dtype, adapter_dtype), base.weight.device

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.lora_embedding_A = empty(r, self.num_embeddings)
        self.lora_embedding_B = empty(self.embedding_dim, r)
        self.lora_magnitude_vector: Magnitude | None = None
        self.reset_parameters()
        if use_dora:
            wide = torch.promote_types(base.weight.dtype, torch.float32)
            norm = torch.linalg.vector_norm(base.weight.detach(), dim=0, dtype=wide)
            self.lora_magnitude_vector = Magnitude(norm, dtype, dora_simple)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        **variants: bool,
    ) -> LoRAEmbedding:
        """An adapted embedding around ``embedding``'s own weight (shared, and frozen by this).

        ``variants``: use_dora, dora_simple. Raises as ``LoRALinear.from_linear`` does, and
        ValueError for an embedding with ``max_norm`` (its forward rewrites the weight) or
        ``sparse``.
        """
        refuse(embedding, cannot_adapt_embedding(embedding), nn.Embedding)
        layer = cls(embedding, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, **variants)
        return layer.train(embedding.training)

    def reset_parameters(self) -> None:
        """Set A to zero and draw B anew; the base stays, and so do magnitudes."""
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def base_forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x, self.weight, self.padding_idx)

    def adapted_forward(self, x: Tensor) -> Tensor:
        return adapted_embedding(
            x,
            self.base_forward(x),
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.scaling,
            self._out_scale(),
            self.padding_idx,
            self.scale_grad_by_freq,
        )

    def tensors(self) -> dict[str, nn.Parameter]:
        found = {
            "lora_embedding_A": self.lora_embedding_A,
            "lora_embedding_B": self.lora_embedding_B,
        }
        if self.lora_magnitude_vector is not None:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector.weight
        return found

    def summary(self) -> str:
        return lora_summary(self)

    def plain(self) -> nn.Embedding:
        embedding = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            device="meta",
        )
        # the very parameter, which a head may be tied to
        embedding.register_parameter("weight", self.weight)
        return embedding.train(self.training)

    def _out_scale(self) -> Tensor | None:
        magnitude = self.lora_magnitude_vector
        if magnitude is None:
            return None
        return magnitude.scale(
            self.weight.t(), self.lora_embedding_A, self.lora_embedding_B, self.scaling
        )

    def _delta(self, dtype: torch.dtype) -> Tensor:
        left, right = self.lora_embedding_A.t().to(dtype), self.lora_embedding_B.t().to(dtype)
        return (left @ right).mul_(self.scaling)

    def _scale(self, dtype: torch.dtype) -> Tensor | None:
        g = self._out_scale()
        return None if g is None else g.to(dtype)

    def _facts(self) -> dict[str, Any]:
        facts = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        if self.padding_idx is not None:
            facts["padding_idx"] = self.padding_idx
        return facts | lora_facts(self)


def adapted_embedding(
    ids: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    out_scale: Tensor | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """y [..., D] = g ∘ (base + s · A[:, ids]ᵀ Bᵀ) in base's dtype. ids [...], base [..., D], A
    [r, V], B [D, r], g [D]; an id of ``padding_idx`` gives A no gradient."""
    t = nn.functional.embedding(ids, lora_A.t(), padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    y = base + (t * scaling) @ lora_B.t()
    return (y if out_scale is None else y * out_scale).to(base.dtype)


def cannot_adapt_embedding(module: nn.Module) -> str | None:
    """Why a ``LoRAEmbedding`` cannot stand in for this module, as a sentence; None if it can."""
    if reason := cannot_adapt(module, nn.Embedding):
        return reason
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None:
        return "it has a max_norm, and so rewrites its weight whenever it is called"
    if module.sparse:
        return "its gradients are sparse, which an adapter's are not"
    return None
