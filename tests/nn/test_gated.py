"""A gated product is not kept for backward, and nothing else changes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.cli.demo import memory
from fastlora.nn import LoRALinear, gated

WIDE, NARROW, ROWS = 24, 8, 6
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "tanh": lambda x: F.gelu(x, approximate="tanh")}


class Block(nn.Module):
    """down(act(gate(x)) * up(x)), in either order."""

    def __init__(self, act=F.silu, swapped=False, between=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(NARROW, WIDE)
        self.up = nn.Linear(NARROW, WIDE)
        self.down = LoRALinear.from_linear(nn.Linear(WIDE, NARROW), r=3, **options)
        with torch.no_grad():
            self.down.lora_B.weight.normal_()
        self.act, self.swapped, self.between = act, swapped, between

    def forward(self, x):
        acted, up = self.act(self.gate(x)), self.up(x)
        h = up * acted if self.swapped else acted * up
        if self.between is not None:
            h = self.between(h)
        return self.down(h)


def run(block, x, wrap=None):
    own = x.clone().requires_grad_()
    y = block(own) if wrap is None else wrap(block, own)
    y.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    return {"y": y.detach(), "x": own.grad} | grads


@pytest.fixture
def found(monkeypatch):
    """What was recognised as a gated product, call by call."""
    seen = []
    original = gated._find

    def looking(x):
        product = original(x)
        seen.append(product is not None)
        return product

    monkeypatch.setattr(gated, "_find", looking)
    return seen


def without(monkeypatch):
    monkeypatch.setattr(gated, "_find", lambda x: None)


OPTIONS = [
    {},
    {"use_dora": True},
    {"lora_dropout": 0.4},
    {"use_lora_fa": True},
    {"lora_bias": True},
]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_stay_bit_for_bit(monkeypatch, found, act, swapped, options):
    block = Block(ACTIVATIONS[act], swapped, **options)
    x = torch.randn(2, ROWS, NARROW)
    torch.manual_seed(1)
    got = run(block, x)
    assert found == [True]
    with monkeypatch.context() as patch:
        without(patch)
        torch.manual_seed(1)
        expected = run(block, x)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


def test_activation_and_product_are_freed(monkeypatch):
    """Of four tensors of the product's size, two are alive between forward and backward."""
    block = Block()
    x = torch.randn(ROWS, NARROW, requires_grad=True)
    alive = []
    for keeps in (True, False):
        with monkeypatch.context() as patch:
            if keeps:
                without(patch)
            alive.append(memory.saved_bytes(lambda: block(x).sum(), torch.device("cpu")))
    assert alive[0] - alive[1] == 2 * ROWS * WIDE * 4


def other_ways():
    return {
        "a dropout between": lambda h: F.dropout(h, 0.0) * 1.0,
        "a scaling between": lambda h: h * 2.0,
        "a view between": lambda h: h.view(-1, WIDE),
        "a hook on it": lambda h: (h.register_hook(lambda g: g * 2), h)[1],
        "its gradient wanted": lambda h: (h.retain_grad(), h)[1],
        "changed in place": lambda h: h.add_(1.0),
        "multiplied in place": lambda h: h.mul_(torch.ones_like(h)),
        "detached": lambda h: h.detach(),
    }


@pytest.mark.parametrize("way", other_ways())
def test_whatever_is_something_else_is_left_alone(monkeypatch, found, way):
    block, x = Block(between=other_ways()[way]), torch.randn(ROWS, NARROW)
    got = run(block, x)
    assert found in ([False], [])  # without a graph nobody looks
    with monkeypatch.context() as patch:
        without(patch)
        expected = run(block, x)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        wanted = expected[name]
        assert tensor is wanted is None or torch.equal(tensor, wanted), name


def test_a_factor_changed_in_place_since_is_left_to_autograds_error():
    block = Block()
    x = torch.randn(ROWS, NARROW)
    gate, up = block.gate(x), block.up(x)
    h = F.silu(gate) * up
    up.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block.down(h).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant):
    block, x = Block(lora_dropout=0.3), torch.randn(ROWS, NARROW)
    torch.manual_seed(2)
    expected = run(block, x)
    torch.manual_seed(2)
    got = run(block, x, lambda b, own: checkpoint(b, own, use_reentrant=reentrant))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_somebodys_own_hooks_see_everything(found):
    block, x = Block(), torch.randn(ROWS, NARROW)
    with torch.autograd.graph.save_on_cpu():
        got = run(block, x)
    assert found == [False]
    expected = run(block, x)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_without_gradients_nothing_is_looked_for(found):
    block = Block()
    with torch.no_grad():
        block(torch.randn(ROWS, NARROW))
    assert found == []


def test_backward_twice_over_a_retained_graph():
    block = Block()
    y = block(torch.randn(ROWS, NARROW)).square().sum()
    y.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    y.backward()
    for name, parameter in block.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_frozen_factors():
    block = Block()
    block.gate.requires_grad_(False)
    x = torch.randn(ROWS, NARROW)
    y = block(x)
    y.sum().backward()
    assert block.up.weight.grad is not None and block.down.lora_A.weight.grad is not None


def test_a_llama_block(tiny_llama, found):
    model = tiny_llama()
    fastlora.inject(model, fastlora.LoRAConfig(r=2))
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    assert found.count(True) == 2  # one a block
