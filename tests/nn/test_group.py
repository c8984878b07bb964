"""Layers that read one input are computed together, and only they."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoRAConfig
from fastlora.adapters import layers
from fastlora.nn import group as group_module
from tests.adapters.family import METHODS, ours, randomise

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """q, k and v of one input; k and v of another if there is one."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(12, 10)
        self.k_proj = nn.Linear(12, 6, bias=False)
        self.v_proj = nn.Linear(12, 8)
        self.o_proj = nn.Linear(10, 12)

    def forward(self, x, other=None):
        other = x if other is None else other
        parts = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        return torch.cat((self.o_proj(parts[0]), *parts[1:]), -1)


@pytest.fixture
def calls(monkeypatch):
    """How many members each call of the grouped operation had."""
    counted = []
    original = group_module.adapter_group

    def counting(x, members):
        counted.append(len(members))
        return original(x, members)

    monkeypatch.setattr(group_module, "adapter_group", counting)
    return counted


def make(method="lora", **more):
    torch.manual_seed(0)
    model = Attention()
    fastlora.inject(model, ours(method, PROJECTIONS, **more))
    randomise(t for layer in layers(model) for t in layer.tensors.values())
    return model


def ungrouped(model):
    model = copy.deepcopy(model)
    for layer in layers(model):
        layer.module.group = None
    return model


def run(model, *inputs):
    """The output and every gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = model(*leaves)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return y.detach(), [leaf.grad for leaf in leaves], grads


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)
    assert got[2].keys() == expected[2].keys()
    for name, grad in got[2].items():
        torch.testing.assert_close(grad, expected[2][name])


@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_those_of_separate_layers(method, calls):
    model = make(method)
    x = torch.randn(2, 5, 12)
    assert_same(run(model, x), run(ungrouped(model), x))
    assert calls == [3]


@pytest.mark.parametrize("alone", ["q_proj", "k_proj", "v_proj"])
def test_a_layer_that_gains_nothing_runs_by_itself(monkeypatch, calls, alone):
    model = make()
    weight = getattr(model, alone).weight
    monkeypatch.setattr(group_module, "gains_nothing", lambda x, member: member.weight is weight)
    x = torch.randn(2, 5, 12)
    for _ in range(5):  # more often than a group forgives results that nobody reads
        assert_same(run(model, x), run(ungrouped(model), x))
    assert calls == [2] * 5
    assert model.q_proj.group._pending is None and not model.q_proj.group._misses


def test_a_layer_that_comes_to_gain_nothing_lets_go_of_what_waited(monkeypatch, calls):
    model = make()
    model.q_proj(torch.randn(4, 12, requires_grad=True))
    assert model.q_proj.group._pending is not None and calls == [3]
    monkeypatch.setattr(group_module, "gains_nothing", lambda x, member: True)
    model.q_proj(torch.randn(4, 12))
    assert model.q_proj.group._pending is None and calls == [3]


def test_nothing_is_kept_once_all_have_been_called(calls):
    model = make()
    model(torch.randn(4, 12))
    assert model.q_proj.group._pending is None and calls == [3]


def test_a_layer_with_an_input_of_its_own_leaves(calls):
    model, plain = make(), ungrouped(make())
    for _ in range(6):
        x, other = torch.randn(3, 12), torch.randn(3, 12)
        assert_same(run(model, x, other), run(plain, x, other))
    # q was computed with k and v, and k with q, until they had missed three times; k has v still
    assert calls == [3, 3] * 3 + [2] * 3
    x = torch.randn(3, 12)
    assert_same(run(model, x), run(plain, x))


def test_an_input_changed_in_place_is_another(calls):
    model = make()
    x = torch.randn(3, 12)
    with torch.no_grad():
        model.q_proj(x)
        x.add_(1.0)
        torch.testing.assert_close(model.k_proj(x), ungrouped(model).k_proj(x))


def test_a_result_made_without_gradients_is_not_used_with_them(calls):
    model = make()
    x = torch.randn(3, 12)
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad
    with torch.inference_mode():
        inside = model(x)
        frozen = torch.randn(3, 12)
        model(frozen)
    torch.testing.assert_close(inside, model(x))


def hook(model):
    model.k_proj.register_forward_hook(lambda m, args, y: y + 1)


def replace_forward(model):
    inner = model.k_proj.forward
    model.k_proj.forward = lambda x: inner(x) + 1


def switch_off(model):
    model.k_proj.enabled = False


def merge_one(model):
    model.k_proj.merge()


@pytest.mark.parametrize("change", [hook, replace_forward, switch_off, merge_one])
def test_a_member_that_computes_something_else_now_is_left_out(change, calls):
    model = make()
    change(model)
    x = torch.randn(3, 12)
    y = model(x)
    with torch.no_grad():
        expected = [ungrouped(model).q_proj(x), model.k_proj(x), ungrouped(model).v_proj(x)]
    torch.testing.assert_close(y[:, 12:18], expected[1])
    torch.testing.assert_close(y[:, 18:], expected[2])
    assert calls[0] == 2


def test_dropout_of_one_member_does_not_touch_the_others():
    model = make(lora_dropout=0.5).train()
    model.q_proj.eval()
    model.v_proj.eval()
    x = torch.randn(3, 12)
    first, second = model(x), model(x)
    changed = [
        not torch.equal(first[:, a:b], second[:, a:b]) for a, b in ((0, 12), (12, 18), (18, 26))
    ]
    assert changed == [False, True, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    model = make(lora_dropout=0.3).train()
    x = torch.randn(3, 12)

    def checkpointed(inner):
        return checkpoint(model, inner, use_reentrant=reentrant)

    torch.manual_seed(5)
    plain = run(model, x)
    checkpointed.named_parameters = model.named_parameters
    checkpointed.parameters = model.parameters
    torch.manual_seed(5)
    assert_same(run(checkpointed, x), plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None])
def test_a_checkpoint_finds_the_same_layers_together(reentrant, count, twin, calls):
    """While layers with inputs of their own leave, in a copy's first step, and with several
    forwards waiting for their backwards."""
    model = make() if twin is None else twin(make())
    plain = ungrouped(model)
    for _ in range(6):
        x = [torch.randn(3, 12, requires_grad=True) for _ in range(count)]
        for each in (model, plain):
            checkpoint(each, *x, use_reentrant=reentrant).square().sum().backward()
    inputs = [[torch.randn(3, 12, requires_grad=True) for _ in range(2)] for _ in range(4)]
    for each in (model, plain):
        outputs = [checkpoint(each, *x, use_reentrant=reentrant) for x in inputs]
        for y in outputs:
            y.square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
    if count == 2:
        calls.clear()
        model(torch.randn(3, 12), torch.randn(3, 12))
        assert calls == [2]  # in the end q has left k and v, which stay together


def test_a_member_that_runs_by_itself_leaves_the_others_their_results(calls):
    model = make()
    hook(model)
    for _ in range(5):
        model(torch.randn(3, 12))
    assert calls == [2] * 5


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_groups_its_own_layers(twin, calls):
    model = make()
    other = twin(model)
    assert other.q_proj.group is other.k_proj.group is not model.q_proj.group
    x = torch.randn(3, 12)
    assert torch.equal(other(x), model(x)) and calls == [3, 3]
    with torch.no_grad():
        other.k_proj.lora_B.weight.add_(1.0)
    assert_same(run(other, x), run(ungrouped(other), x))
    assert not torch.equal(other(x), model(x))


def test_a_shallow_copy_takes_nobodys_place(calls):
    model = make()
    alone = copy.copy(model.q_proj)
    x = torch.randn(3, 12)
    torch.testing.assert_close(alone(x), model.q_proj(x))
    model(x)
    assert calls == [3, 3]


def test_a_result_does_not_outlive_a_change_of_its_weights(calls):
    model = make()
    x = torch.randn(3, 12)
    model.q_proj(x)  # computes k and v besides
    with torch.no_grad():
        model.k_proj.lora_B.weight.add_(1.0)
    torch.testing.assert_close(model.k_proj(x), ungrouped(model).k_proj(x))


def test_a_copy_of_one_layer_stands_alone():
    model = make()
    alone = copy.deepcopy(model.q_proj)
    x = torch.randn(3, 12)
    torch.testing.assert_close(alone(x), model.q_proj(x))


def test_threads_do_not_mix_results():
    model, plain = make(), ungrouped(make())
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            x = torch.randn(3, 12, generator=generator)
            with torch.no_grad():
                if not torch.allclose(model(x), plain(x), atol=1e-5):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_torch_compile_takes_the_layers_one_by_one(calls):
    model = make()
    x = torch.randn(3, 12, requires_grad=True)
    compiled = torch.compile(lambda x: model(x * 2), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ungrouped(model)(x * 2))
    assert calls == []


def test_a_layer_shared_by_two_names_is_no_group_of_its_own():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 4)
            self.k_proj = self.q_proj

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x)

    model = Shared()
    report = fastlora.inject(model, LoRAConfig(r=2))
    assert model.q_proj.group is None and "computed with" not in str(report)
    model(torch.randn(2, 4)).sum().backward()


def test_autocast(calls):
    model = make()
    x = torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        expected = ungrouped(model)(x)
    assert y.dtype == torch.bfloat16 and calls == [3]
    torch.testing.assert_close(y, expected, atol=5e-2, rtol=5e-2)


class CrossAttention(nn.Module):
    """q of one input, k and v of another that is wider."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(12, 10), nn.Linear(20, 10), nn.Linear(20, 10)

    def forward(self, x, other):
        return self.to_q(x), self.to_k(other), self.to_v(other)


@pytest.mark.parametrize("accelerated", [False, True])
def test_only_layers_of_one_width_are_put_together(accelerated, calls):
    torch.manual_seed(0)
    model, names = CrossAttention(), ["to_q", "to_k", "to_v"]
    if accelerated:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        x, other = torch.randn(7, 12), torch.randn(9, 20)
        expected = model(x, other)
        report = fastlora.accelerate(model)
    else:
        report = fastlora.inject(model, LoRAConfig(r=4, target_modules=names))
        randomise(t for layer in layers(model) for t in layer.tensors.values())
        x, other = torch.randn(7, 12), torch.randn(9, 20)
        expected = ungrouped(model)(x, other)
    said = {row.name.rpartition(".")[2]: row.detail for row in report.fused}
    assert "computed with" not in said["to_q"] and "computed with to_v" in said["to_k"]
    for y, wanted in zip(model(x, other), expected, strict=True):
        torch.testing.assert_close(y, wanted)
    assert calls == [2]


def test_a_member_that_does_not_fit_raises_at_its_own_call_only(calls):
    model, x = make(), torch.randn(7, 12)
    model.v_proj.lora_A.to(torch.float64)
    expected = ungrouped(model).q_proj(x)
    torch.testing.assert_close(model.q_proj(x), expected)
    with pytest.raises(TypeError, match="lora_A is torch"):
        model.v_proj(x)


@pytest.mark.parametrize("change", ["eval", "scaling", "resize", "trained"])
def test_a_result_does_not_outlive_a_change_of_its_layer(change, calls):
    model, x = make("lora", lora_dropout=0.5 if change == "eval" else 0.0), torch.randn(7, 12)
    layer = model.v_proj
    layer.requires_grad_(change != "trained")
    model.q_proj(x)
    if change == "eval":
        model.eval()
    elif change == "scaling":
        layer.scaling *= 3
    elif change == "resize":
        fastlora.resize(model, rank=1)
    else:
        layer.lora_B.requires_grad_(True)
    stale = layer(x)
    assert stale.requires_grad
    torch.testing.assert_close(stale, ungrouped(model).v_proj(x))
