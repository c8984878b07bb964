"""Products that can be computed again are not kept for backward, and nothing else changes."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.cli.demo import memory
from fastlora.nn import LoRALinear, group, recomputed

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
    original = recomputed.find

    def looking(x):
        product = original(x)
        seen.append(product is not None)
        return product

    monkeypatch.setattr(recomputed, "find", looking)
    return seen


def without(monkeypatch):
    monkeypatch.setattr(recomputed, "find", lambda x: None)


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


@pytest.mark.parametrize(
    "options, freed", [({}, 2), ({"use_dora": True}, 2), ({"use_lora_fa": True}, 1)]
)
def test_activation_and_product_are_freed(monkeypatch, options, freed):
    """Of four tensors of the product's size, gate and up are alive between forward and backward: a
    layer whose A is frozen does not keep the product anyway."""
    block = Block(**options)
    x = torch.randn(ROWS, NARROW, requires_grad=True)
    alive = []
    for keeps in (True, False):
        with monkeypatch.context() as patch:
            if keeps:
                without(patch)
            alive.append(memory.saved_bytes(lambda: block(x).sum(), torch.device("cpu")))
    assert alive[0] - alive[1] == freed * ROWS * WIDE * 4


def other_ways():
    """What may stand between the product and the layer, and whether a recipe is found then."""
    return {
        "a scaling": (lambda h: h * 2.0, True),
        "a product of three": (lambda h: h * h.detach(), True),
        "a shift": (lambda h: h + 2.0, False),
        "a dropout": (lambda h: F.dropout(h, 0.3), True),
        "a view": (lambda h: h.view(-1, WIDE), False),
        "another layout": (lambda h: (h.t().contiguous() * 1.0).t(), False),
        "a hook on it": (lambda h: (h.register_hook(lambda g: g * 2), h)[1], True),
        "its gradient wanted": (lambda h: (h.retain_grad(), h)[1], True),
        "changed in place": (lambda h: h.add_(1.0), False),
        "multiplied in place": (lambda h: h.mul_(torch.ones_like(h)), False),
        "detached": (lambda h: h.detach(), False),
    }


@pytest.mark.parametrize("way", other_ways())
def test_whatever_is_something_else_is_taken_as_it_is(monkeypatch, found, way):
    between, expected = other_ways()[way]
    block, x = Block(between=between), torch.randn(ROWS, NARROW)
    torch.manual_seed(4)
    got = run(block, x)
    assert any(found) == expected
    with monkeypatch.context() as patch:
        without(patch)
        torch.manual_seed(4)
        expected = run(block, x)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        wanted = expected[name]
        assert tensor is wanted is None or torch.equal(tensor, wanted), name


@pytest.mark.parametrize("late", [False, True])
def test_whoever_looks_at_what_lies_between_sees_what_there_was(monkeypatch, found, late):
    """Hooks, retained and asked-for gradients of the factors, the activation and the product, set
    before the layer's call or after it."""

    def look():
        block, seen = Block(), []
        x = torch.randn(ROWS, NARROW, generator=torch.Generator().manual_seed(3))
        gate, up = block.gate(x), block.up(x)
        acted = F.silu(gate)
        h = acted * up
        between = (gate, up, acted, h)

        def watch():
            for tensor in between:
                tensor.register_hook(lambda g: (seen.append(g), g * 2)[1])
                tensor.retain_grad()

        if not late:
            watch()
        y = block.down(h).square().sum()
        if late:
            watch()
        asked = torch.autograd.grad(y, between, retain_graph=True)
        y.backward()
        return [*asked, *seen, *(t.grad for t in between), block.gate.weight.grad]

    got = look()
    assert found == [True]
    without(monkeypatch)
    for mine, theirs in zip(got, look(), strict=True):
        assert torch.equal(mine, theirs)


def test_backward_computes_an_activation_once(monkeypatch):
    """For the layer's input and the product's own gradient; and again for a graph that is gone
    through again, after a backward that never came to the product, too."""
    calls = []

    def silu(gate):
        calls.append(gate)
        return F.silu(gate)

    monkeypatch.setitem(recomputed._ACTIVATIONS, "SiluBackward0", lambda node: silu)
    block, x = Block(), torch.randn(ROWS, NARROW)
    parameters = [p for p in block.parameters() if p.requires_grad]
    y = block(x).square().sum()
    expected = torch.autograd.grad(y, parameters, retain_graph=True)
    assert len(calls) == 1
    torch.autograd.grad(y, block.down.lora_B.weight, retain_graph=True)
    for turn in (3, 4):
        got = torch.autograd.grad(y, parameters, retain_graph=True)
        assert all(map(torch.equal, got, expected))
        assert len(calls) == turn


@pytest.mark.parametrize("swapped", [False, True])
def test_two_layers_on_one_product_whose_other_factor_is_frozen_or_not(monkeypatch, swapped):
    def grads(frozen):
        block, other = Block(swapped=swapped), LoRALinear.from_linear(nn.Linear(WIDE, 2), r=2)
        block.up.requires_grad_(not frozen)
        block.between = lambda h: (results.append(other(h)), h)[1]
        x, results = torch.ones(ROWS, NARROW), []
        (block(x).square().sum() + results[0].sum()).backward()
        return [p.grad for p in block.parameters() if p.grad is not None]

    for frozen in (True, False):
        torch.manual_seed(1)
        got = grads(frozen)
        with monkeypatch.context() as patch:
            without(patch)
            torch.manual_seed(1)
            expected = grads(frozen)
        assert len(got) == len(expected)
        assert all(map(torch.equal, got, expected))


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


def test_transforms_and_forward_mode_see_the_plain_formula():
    block, x = Block(), torch.randn(ROWS, NARROW)

    def loss(x):
        return block(x).square().sum()

    expected = run(block, x)["x"]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    direction = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), direction)
        slope = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(slope, (expected * direction).sum())


class Normed(nn.Module):
    """A llama's norm before a layer, its own weight trained or not."""

    def __init__(self, trained, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Parameter(torch.randn(NARROW).to(dtype), requires_grad=trained)
        linear = nn.Linear(NARROW, WIDE, dtype=dtype)
        self.layer = LoRALinear.from_linear(linear, r=3)
        with torch.no_grad():
            self.layer.lora_B.weight.normal_()

    def forward(self, h):
        wide = h.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.layer(self.norm * wide.to(h.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("trained", [False, True])
def test_a_norm_is_computed_again(monkeypatch, found, dtype, trained):
    block, x = Normed(trained, dtype), torch.randn(2, ROWS, NARROW, dtype=dtype)
    got = run(block, x)
    assert found == [True]
    own = x.clone().requires_grad_()
    kept = [memory.saved_bytes(lambda: block(own).sum(), torch.device("cpu"))]
    with monkeypatch.context() as patch:
        without(patch)
        expected = run(block, x)
        kept.append(memory.saved_bytes(lambda: block(own).sum(), torch.device("cpu")))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert kept[1] - kept[0] == x.numel() * x.element_size()


@pytest.mark.parametrize("what", ["the norm's input", "an operand"])
def test_what_is_read_again_must_not_be_changed_in_place(what):
    block = Normed(False, torch.float32)
    h = torch.randn(ROWS, NARROW, requires_grad=True) * 1.0
    y = block(h)
    with torch.no_grad():
        (h if what == "the norm's input" else block.layer.lora_B.weight).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), block.layer.lora_A.weight)


def test_an_output_kept_beside_a_recomputed_input_is_freed_with_its_graph():
    layer = LoRALinear.from_linear(nn.Linear(NARROW, WIDE), r=3, use_dora=True)
    h = torch.randn(ROWS, NARROW, requires_grad=True)
    y = layer(F.silu(h) * h)
    memory_of_y = StorageWeakRef(y.untyped_storage())
    del y
    assert memory_of_y.expired()


def test_a_llama(monkeypatch, tiny_llama, found):
    """In each block q, k and v share one norm, gate and up another, and down has the gate."""
    monkeypatch.setattr(group, "gains_nothing", lambda x, member: False)
    model = tiny_llama()
    fastlora.inject(model, fastlora.LoRAConfig(r=2))
    model.enable_input_require_grads()
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    assert found.count(True) == 6 and found.count(False) == 2  # o_proj's input is a view
