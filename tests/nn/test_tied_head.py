"""The tied head, plain and with its halves swapped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora.nn import TiedHead


@pytest.mark.parametrize("swap", [False, True])
def test_the_formula_and_its_gradients(swap):
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 6, dtype=torch.float64)
    head = TiedHead(embedding, swap_halves=swap, bias=True)
    assert (
        head.weight is embedding.weight
        and len(list(nn.ModuleList([embedding, head]).parameters())) == 2
    )
    hidden = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    matrix = embedding.weight
    swapped = torch.cat([matrix[:, 3:], matrix[:, :3]], 1) if swap else matrix
    expected = hidden @ swapped.t() + head.bias
    logits = head(hidden)
    torch.testing.assert_close(logits, expected)
    given = torch.randn_like(logits)
    found = torch.autograd.grad(logits, [hidden, matrix, head.bias], given)
    for one, other in zip(
        found, torch.autograd.grad(expected, [hidden, matrix, head.bias], given), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_swapped_a_token_does_not_predict_itself():
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 64)
    ids = torch.arange(50)
    plain = TiedHead(embedding, swap_halves=False)(embedding(ids)).argmax(-1)
    swapped = TiedHead(embedding)(embedding(ids)).argmax(-1)
    assert torch.equal(plain, ids) and (swapped == ids).float().mean() < 0.2


def test_in_a_transformers_model(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    model.set_output_embeddings(TiedHead(model.get_input_embeddings()))
    batch = torch.randint(0, 96, (2, 8))
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    assert (model.get_input_embeddings().weight.grad.abs().amax(1) > 0).all()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_refusals():
    with pytest.raises(TypeError, match="not Linear"):
        TiedHead(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="5 channels"):
        TiedHead(nn.Embedding(3, 5))
    assert TiedHead(nn.Embedding(3, 5), swap_halves=False)
    for options in ({"max_norm": 1.0}, {"sparse": True}):
        with pytest.raises(ValueError, match="cannot be a head's too"):
            TiedHead(nn.Embedding(3, 4, **options))
