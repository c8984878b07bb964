"""LoRA-FA's correction of B's gradient."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdaLoRAConfig, LoRAConfig
from fastlora.adapters import layers
from fastlora.methods import LoRAFA

peft = pytest.importorskip("peft")


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)).to(dtype)
    fastlora.inject(model, LoRAConfig(r=3, lora_alpha=5, use_lora_fa=True, **options))
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B.normal_()
    return model


def backward(model, x):
    model(x).square().sum().backward()


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


def test_the_corrected_update_is_the_full_gradient_projected_onto_A():
    """methods.md's identity s · g_B A = G P_A, G being the gradient of the whole weight."""
    model = make()
    x = torch.randn(9, 12, dtype=torch.float64)
    dense = copy.deepcopy(model)
    fastlora.merge(dense)
    for layer in layers(dense):
        layer.weight.requires_grad_(True)
    backward(dense, x)
    optimizer = sgd(model)
    LoRAFA().attach(model, optimizer)
    backward(model, x)
    optimizer.step()
    for layer, full in zip(layers(model), layers(dense), strict=True):
        A, G = layer.lora_A.detach(), full.weight.grad
        projection = A.T @ torch.linalg.inv(A @ A.T) @ A
        update = layer.scaling * layer.lora_B.grad @ A
        # the damping of 1e-8 moves the projection by 1e-8 / λ, with λ about 0.1 here
        torch.testing.assert_close(update, G @ projection, atol=1e-6, rtol=1e-6)


def test_orthonormal_rows_and_a_scaling_of_one_change_nothing():
    model = make(alpha_pattern={"0": 3, "2": 3})
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_A.copy_(torch.linalg.qr(layer.lora_A.T)[0].T)
    optimizer = sgd(model)
    LoRAFA().attach(model, optimizer)
    backward(model, torch.randn(9, 12, dtype=torch.float64))
    before = [layer.lora_B.grad.clone() for layer in layers(model)]
    optimizer.step()
    for layer, gradient in zip(layers(model), before, strict=True):
        torch.testing.assert_close(layer.lora_B.grad, gradient, atol=1e-6, rtol=1e-6)


def test_steps_are_those_of_pefts_optimizer(monkeypatch):
    """In float32 throughout: peft multiplies in bfloat16 where it can."""
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    mine = copy.deepcopy(base)
    fastlora.inject(mine, LoRAConfig(r=3, lora_alpha=5, use_lora_fa=True))
    with torch.no_grad():
        for layer, other in zip(layers(mine), layers(theirs), strict=True):
            layer.lora_A.copy_(other.lora_A)
    rival = create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-2)
    trained = [p for p in mine.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-6, weight_decay=0.0)
    LoRAFA().attach(mine, optimizer)
    for step in range(6):
        x = torch.randn(9, 12, generator=torch.Generator().manual_seed(step))
        for model, own in ((theirs, rival), (mine, optimizer)):
            model.zero_grad()
            backward(model, x)
            own.step()
        for layer, other in zip(layers(mine), layers(theirs), strict=True):
            torch.testing.assert_close(layer.lora_B, other.lora_B, atol=2e-5, rtol=2e-4)


def test_it_works_on_a_peft_model_and_lets_go():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 10)), peft.LoraConfig(r=3, target_modules=["0"])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = LoRAFA().attach(model, optimizer)
    (layer,) = layers(model)
    assert not layer.lora_A.requires_grad
    with pytest.raises(RuntimeError, match="attached already"):
        method.attach(model, optimizer)
    backward(model, torch.randn(4, 12))
    before = layer.lora_B.grad.clone()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: None)
    assert torch.equal(layer.lora_B.grad, before)
    optimizer.step()
    assert not torch.equal(layer.lora_B.grad, before)
    method.detach()
    corrected = layer.lora_B.grad.clone()
    optimizer.step()
    assert torch.equal(layer.lora_B.grad, corrected)
    with pytest.raises(RuntimeError, match="not attached"):
        method.detach()


def test_a_loaded_A_is_noticed():
    model = make()
    optimizer = sgd(model)
    LoRAFA().attach(model, optimizer)
    with torch.no_grad():
        layers(model)[0].lora_A.mul_(2.0)
    backward(model, torch.randn(4, 12, dtype=torch.float64))
    layer = layers(model)[0]
    before = layer.lora_B.grad.clone()
    optimizer.step()
    A = layer.lora_A.detach()
    expected = before @ torch.linalg.inv(A @ A.T) / layer.scaling**2
    torch.testing.assert_close(layer.lora_B.grad, expected, atol=1e-6, rtol=1e-6)


def test_a_layer_without_gradient_is_passed_over():
    model = make()
    optimizer = sgd(model)
    LoRAFA().attach(model, optimizer)
    backward(model, torch.randn(4, 12, dtype=torch.float64))
    first, second = layers(model)
    first.lora_B.grad = None
    before = second.lora_B.grad.clone()
    optimizer.step()
    assert first.lora_B.grad is None and not torch.equal(second.lora_B.grad, before)


@pytest.mark.parametrize(
    "config, words",
    [
        (LoRAConfig(r=2, use_dora=True), "it computes DoRA"),
        (AdaLoRAConfig(init_r=2), "an adapter of ADALORA"),
    ],
)
def test_what_it_is_not_made_for(config, words):
    model = nn.Sequential(nn.Linear(4, 4))
    fastlora.inject(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=words):
        LoRAFA().attach(model, optimizer)
    assert layers(model)[0].lora_A.requires_grad
    with pytest.raises(ValueError, match="no LoRA layers"):
        LoRAFA().attach(nn.Linear(2, 2), optimizer)
