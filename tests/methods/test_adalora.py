"""AdaLoRA's regulariser."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdaLoRAConfig, LoRAConfig
from fastlora.adapters import layers
from fastlora.methods import orthogonal_regulariser


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, 10)).double()
    fastlora.inject(model, AdaLoRAConfig(init_r=3, **options))
    return model


def naive(model):
    terms = []
    for layer in layers(model):
        for rows in (layer.lora_A, layer.lora_B.T):
            terms.append((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).norm())
    return sum(terms) / len(terms)


def test_value_and_gradient_are_the_formulas():
    model = make()
    results = []
    for regulariser in (orthogonal_regulariser, naive):
        model.zero_grad()
        value = regulariser(model)
        value.backward()
        results.append([value.detach(), *(layer.lora_A.grad.clone() for layer in layers(model))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_it_is_what_peft_adds_to_the_loss(tiny_llama):
    peft = pytest.importorskip("peft")
    ids = torch.arange(12)[None]
    config = peft.AdaLoraConfig(
        init_r=3,
        total_step=5,
        target_modules=["q_proj"],
        orth_reg_weight=0.7,
        task_type="CAUSAL_LM",  # only then does peft's model add it
    )
    model = peft.get_peft_model(tiny_llama(), config)
    with_it = model(input_ids=ids, labels=ids).loss
    model.peft_config["default"].orth_reg_weight = 0.0
    without = model(input_ids=ids, labels=ids).loss
    expected = without + 0.7 * orthogonal_regulariser(model)
    torch.testing.assert_close(with_it, expected)


def test_orthonormal_factors_cost_nothing():
    model = make()
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_A.copy_(torch.linalg.qr(layer.lora_A.T)[0].T)
            layer.lora_B.copy_(torch.linalg.qr(layer.lora_B)[0])
    value = orthogonal_regulariser(model)
    assert value < 1e-12
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_A.copy_(torch.eye(*layer.lora_A.shape))
            layer.lora_B.copy_(torch.eye(*layer.lora_B.shape))
    value = orthogonal_regulariser(model)
    value.backward()
    assert value == 0.0 and not layers(model)[0].lora_A.grad.any()  # and no NaN


def test_layers_without_ranks_count_as_zero():
    model = make(rank_pattern={"1.lora_E": [False] * 3})
    assert torch.isfinite(orthogonal_regulariser(model))
    torch.testing.assert_close(orthogonal_regulariser(model), naive(model))


def test_other_adapters_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    fastlora.inject(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="no AdaLoRA layers"):
        orthogonal_regulariser(model)
