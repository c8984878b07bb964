"""A head over the matrix of the embedding, plain or with its channel halves swapped."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TiedHead(nn.Module):
    """logits = h' Eᵀ (+ bias), E [V, D] being the embedding's own parameter.

    With ``swap_halves`` (kexue 9698), h' is h with its two channel halves exchanged, which is the
    same as a matrix whose halves are: a token's output vector is then not its input vector, so that
    a model without layers does not predict what it was just given, as plainly tied ones do.
    ``False`` ties plainly, h' = h.

    Tied, a row of E gets a gradient from the softmax at every step, so that a sign optimizer does
    not carry rows of rare tokens off (kexue 9736; fastlora/optim/README.md).

    transformers' models take one by ``model.set_output_embeddings(TiedHead(embedding))``. A
    checkpoint has the matrix under both names, as with every tied head.
    """

    def __init__(
        self, embedding: nn.Embedding, swap_halves: bool = True, bias: bool = False
    ) -> None:
        """Raises TypeError if it is not an ``nn.Embedding``; ValueError for one with ``max_norm``,
        with ``sparse`` (a head's gradient is dense), or an odd D with ``swap_halves``."""
        super().__init__()
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"expected an nn.Embedding, not {type(embedding).__name__}")
        if embedding.max_norm is not None or embedding.sparse:
            raise ValueError(
                "an embedding with max_norm or sparse gradients cannot be a head's too"
            )
        if swap_halves and embedding.embedding_dim % 2:
            raise ValueError(f"{embedding.embedding_dim} channels have no halves to swap")
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.swap_halves = swap_halves
        self.weight = embedding.weight
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(self.weight.new_zeros(self.out_features))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] → logits [..., V]."""
        if self.swap_halves:
            first, second = hidden.chunk(2, dim=-1)
            hidden = torch.cat([second, first], dim=-1)
        return nn.functional.linear(hidden, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"swap_halves={self.swap_halves}"
        )
