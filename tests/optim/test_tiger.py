"""Tiger against its published rules: kinds, accumulation, schedule, NaN, zeros."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

import fastlora
from fastlora.optim import Lion, Tiger, param_groups, piecewise_linear
from tests.optim.published import Tiger as Published

KINDS = {
    "embedding": (11, 6),
    "other": (6, 5),
    "gamma": (6,),
    "beta": (6,),
}


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in KINDS.values()]


def groups(params):
    return [
        {"params": [(kind, param)], "kind": kind} for kind, param in zip(KINDS, params, strict=True)
    ]


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()


def close(ours, theirs, dtype):
    atol = 2e-6 if dtype == torch.float32 else 1e-13
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3])
def test_the_published_trajectory(dtype, k):
    """Kinds, schedule, accumulation and gradients that are not finite, at any micro-step."""
    ours, theirs = [nn.Parameter(t) for t in tensors(0, dtype)], tensors(0, dtype)
    schedule = {4: 1.0, 20: 0.1}
    optimizer = Tiger(
        groups(ours), lr=1e-2, beta=0.9, weight_decay=0.1, grad_accum_steps=k, lr_schedule=schedule
    )
    published = Published(theirs, KINDS, 1e-2, 0.9, 0.1, k, lambda t: piecewise_linear(t, schedule))
    for step in range(30):
        grads = tensors(step + 1, dtype)
        if step in (7, 12, 14):
            grads[step % 4].view(-1)[1] = math.nan if step % 2 else math.inf
        give(ours, grads)
        optimizer.step()
        published.step(grads)
        close(ours, theirs, dtype)
        close([optimizer.state[p]["exp_avg"] for p in ours], published.m, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_relative_rates_it_is_lion_with_equal_betas(dtype):
    ours = [nn.Parameter(t.to(dtype)) for t in tensors(0)]
    lions = [nn.Parameter(p.detach().clone()) for p in ours]
    tiger = Tiger(
        groups(ours), lr=1e-3, beta=0.95, weight_decay=0.1, relative_lr=False, shrink_ratio=None
    )
    lion = Lion(lions, lr=1e-3, betas=(0.95, 0.95), weight_decay=0.1)
    for step in range(50):
        grads = [g.to(dtype) for g in tensors(step + 1)]
        give(ours, grads)
        give(lions, grads)
        tiger.step()
        lion.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, lions, strict=True))


def test_micro_steps_are_one_step_of_the_mean():
    """To the bit where the arithmetic is exact: β and 1/k powers of two, gradients of few bits."""
    ours = [nn.Parameter(t.round(decimals=1)) for t in tensors(0)]
    whole = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 2**-7, "beta": 0.5, "weight_decay": 0.1}
    split = Tiger(groups(ours), grad_accum_steps=4, **options)
    once = Tiger(groups(whole), **options)
    for step in range(5):
        parts = [[(g * 8).round() for g in tensors(10 * step + i)] for i in range(4)]
        before = [p.detach().clone() for p in ours]
        for i, grads in enumerate(parts):
            assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True)), i
            give(ours, grads)
            split.step()
        give(whole, [sum(each) / 4 for each in zip(*parts, strict=True)])
        once.step()
        for p, q in zip(ours, whole, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(split.state[p]["exp_avg"], once.state[q]["exp_avg"])


def test_a_gradient_that_is_missing_counts_as_zero():
    ours = [nn.Parameter(t.double()) for t in tensors(0)]
    whole = [nn.Parameter(p.detach().clone()) for p in ours]
    split, once = Tiger(groups(ours), grad_accum_steps=2), Tiger(groups(whole))
    for step in range(6):
        first, second = tensors(2 * step + 1, torch.float64), tensors(2 * step + 2, torch.float64)
        give(ours, first)
        ours[0].grad = ours[3].grad = None  # [3] never has one in this cycle
        split.step()
        give(ours, second)
        ours[1].grad = ours[3].grad = None
        split.step()
        give(whole, [(a + b) / 2 for a, b in zip(first, second, strict=True)])
        whole[0].grad, whole[1].grad, whole[3].grad = second[0] / 2, first[1] / 2, None
        once.step()
        close(ours, [q.detach() for q in whole], torch.float64)
    assert ours[3] not in split.state


def test_a_run_resumed_within_a_cycle_goes_on_exactly():
    straight = [nn.Parameter(t) for t in tensors(0)]
    options = {"grad_accum_steps": 3, "lr_schedule": {5: 1.0}, "state_dtype": "bfloat16"}
    adam = {"algorithm": "adamw", "lr": 1e-2}

    def make(params):
        made = groups(params)
        made[1] |= {"lazy_rows": True}
        made[3] |= adam
        return Tiger(made, **options)

    optimizer = make(straight)
    for step in range(7):
        give(straight, tensors(step + 1))
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in straight]
    again = make(resumed)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in range(7, 13):
        for params, each in ((straight, optimizer), (resumed, again)):
            give(params, tensors(step + 1))
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))


def test_the_nan_rule_alone():
    p, gamma = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.full((2,), 3.0))
    optimizer = Tiger(
        [{"params": [p], "kind": "other"}, {"params": [gamma], "kind": "gamma"}], lr=0.1
    )
    give((p, gamma), (torch.ones(2, 2), torch.ones(2)))
    optimizer.step()
    m = optimizer.state[p]["exp_avg"].clone()
    before, gamma_before = p.detach().clone(), gamma.detach().clone()
    give((p, gamma), (torch.tensor([[1.0, 1.0], [math.inf, 1.0]]), torch.tensor([math.nan, 0.0])))
    optimizer.step()
    torch.testing.assert_close(p.data, 0.99 * before)
    torch.testing.assert_close(gamma.data, 1 + 0.99 * (gamma_before - 1))
    assert torch.equal(optimizer.state[p]["exp_avg"], m)


def test_without_the_rule_what_is_not_finite_goes_into_momentum():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Tiger([p], shrink_ratio=None)
    p.grad = torch.tensor([[1.0, math.nan], [1.0, 1.0]])
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].isnan().sum() == 1 and not p.isnan().any()


# --- tensors that start at zero ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "floor"), [((8, 4), 0.5), ((8, 4, 1, 1), 0.5), ((5, 1), 1.0), ((2, 16), 0.25)]
)
def test_zero_tensors_move_from_the_start_and_later(shape, floor):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Tiger([p], lr=1e-2, weight_decay=0.0)
    for step in (1, 2):
        p.grad = torch.ones(shape)
        optimizer.step()
        torch.testing.assert_close(p.data, torch.full(shape, -1e-2 * floor * step))
    again = Tiger([p], lr=1e-2, weight_decay=0.0)  # a resumed run keeps the floor
    again.load_state_dict(optimizer.state_dict())
    p.grad = torch.ones(shape)
    again.step()
    torch.testing.assert_close(p.data, torch.full(shape, -3e-2 * floor))


def test_other_tensors_have_no_floor_unless_given():
    p, q = nn.Parameter(torch.full((4, 4), 1e-3)), nn.Parameter(torch.full((4, 4), 1e-3))
    optimizer = Tiger([{"params": [p]}, {"params": [q], "floor": 0.1}], lr=0.1, weight_decay=0.0)
    give((p, q), (torch.ones(4, 4), torch.ones(4, 4)))
    optimizer.step()
    torch.testing.assert_close(p.data, torch.full((4, 4), 1e-3 - 1e-4))
    torch.testing.assert_close(q.data, torch.full((4, 4), 1e-3 - 1e-2))


@pytest.mark.parametrize(
    "config",
    [
        fastlora.LoRAConfig(r=4),
        fastlora.LoRAConfig(r=4, use_dora=True),
        fastlora.LoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
        fastlora.AdaLoRAConfig(init_r=4, target_r=2, total_step=50),
        fastlora.VeRAConfig(r=8),
    ],
    ids=["lora", "dora", "embedding", "adalora", "vera"],
)
def test_every_adapter_trains(config, tiny_llama):
    """No trained parameter stands still, and the loss falls (of AdaLoRA slowly)."""
    model = tiny_llama()
    fastlora.inject(model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = Tiger(param_groups(model), lr=3e-2)
    torch.manual_seed(0)
    batch = torch.randint(0, 96, (4, 16))
    losses = []
    for _ in range(12):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - (0.005 if isinstance(config, fastlora.AdaLoRAConfig) else 0.05)
    for name, param in model.named_parameters():
        if name in before:
            assert not torch.equal(param, before[name]), name


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": -1e-3}, "lr must be"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\)"),
        ({"beta": math.nan}, r"beta must be in \[0, 1\)"),
        ({"grad_accum_steps": 0}, "whole number of at least 1"),
        ({"grad_accum_steps": 1.5}, "whole number of at least 1"),
        ({"shrink_ratio": 1.5}, "shrink_ratio must be in"),
        ({"floor": -1.0}, "floor must be"),
        ({"kind": "bias"}, "kind must be one of"),
        ({"lr_schedule": {}}, "lr_schedule must be a dictionary"),
        ({"lr_schedule": {1.5: 1.0}}, "steps must be whole numbers"),
        ({"lr_schedule": {1: math.nan}}, "factors must be finite"),
        ({"capturable": True, "grad_accum_steps": 2}, "cannot count"),
        ({"lazy_rows": True, "lazy_momentum": True, "grad_accum_steps": 2}, "lazy_momentum needs"),
    ],
)
def test_refused_options(options, expected):
    with pytest.raises(ValueError, match=expected):
        Tiger([nn.Parameter(torch.ones(2, 2))], **options)


def test_groups_count_together():
    optimizer = Tiger([nn.Parameter(torch.ones(2, 2))], grad_accum_steps=2)
    other = {"params": [nn.Parameter(torch.ones(2, 2))], "grad_accum_steps": 3}
    with pytest.raises(ValueError, match="same for all groups"):
        optimizer.add_param_group(other)
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert optimizer.param_groups[1]["steps"] == 1


def test_a_micro_step_that_raises_takes_in_nothing():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = Tiger([{"params": [p]}, {"params": [q], "maximize": True}], grad_accum_steps=2)
    give((p, q), (torch.ones(3), torch.ones(3)))
    q.grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has been freed"):
        optimizer.step()
    assert not optimizer.state[p]["exp_avg"].any() and "folded" not in optimizer.state[p]


def test_a_cycle_left_open_is_closed_by_the_next_step():
    p, adam = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = Tiger(
        [{"params": [p]}, {"params": [adam], "algorithm": "adamw"}], beta=0.5, grad_accum_steps=4
    )
    give((p, adam), (torch.ones(3), torch.ones(3)))
    optimizer.step()
    for group in optimizer.param_groups:
        group["grad_accum_steps"] = 1
    means = []
    for _ in range(3):
        give((p, adam), (torch.ones(3), torch.ones(3)))
        optimizer.step()
        means.append(float(optimizer.state[p]["exp_avg"][0]))
    assert means == [0.625, 0.8125, 0.90625]  # 1/8 + 1/2, then halfway to 1 each time
    assert "folded" not in optimizer.state[p] and "grad_sum" not in optimizer.state[adam]


def test_also_by_a_step_of_plain_parameters_alone_and_after_loading():
    p = nn.Parameter(torch.zeros(3))
    split = Tiger([p], beta=0.5, grad_accum_steps=2)
    p.grad = torch.ones(3)
    split.step()
    state = split.state_dict()
    state["param_groups"][0]["grad_accum_steps"] = 1
    optimizer = Tiger([p], beta=0.5)
    optimizer.load_state_dict(state)
    for expected in (0.75, 0.875):
        optimizer.step()
        assert float(optimizer.state[p]["exp_avg"][0]) == expected


def test_a_state_of_adamw_saved_after_the_first_micro_step():
    nets = [nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    both = [
        Tiger(param_groups(net, embedding={"algorithm": "adamw"}), grad_accum_steps=2)
        for net in nets
    ]
    nets[0](torch.tensor([1, 2])).sum().backward()
    both[0].step()
    both[1].load_state_dict(both[0].state_dict())
    for net, optimizer in zip(nets, both, strict=True):
        optimizer.zero_grad()
        net(torch.tensor([3])).sum().backward()
        optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_rates_follow_other_parameters_and_states():
    p = nn.Parameter(torch.randn(8, 8))
    optimizer = Tiger([p], lr=0.1, weight_decay=0.0)

    def moved(param):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        return float((before - param.detach()).max())

    for _ in range(2):
        moved(p)
    with torch.no_grad():
        p.zero_()
    optimizer.state.clear()  # zero at its first step now: it has a floor
    for _ in range(3):
        assert moved(p) == pytest.approx(0.1 / 8**0.5, rel=1e-3)
    q = nn.Parameter(torch.randn(8))
    optimizer.param_groups[0]["params"][0] = q
    optimizer.state.clear()
    for _ in range(3):
        assert moved(q) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("kind", [None, "embedding"])
@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0,), (0, 0)])
def test_empty_tensors(shape, kind):
    p, q = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(2, 2))
    optimizer = Tiger([{"params": [p, q], "kind": kind}], lr=0.5, weight_decay=0.0)
    for _ in range(2):
        give((p, q), (torch.zeros(shape), torch.ones(2, 2)))
        optimizer.step()
    torch.testing.assert_close(q.data, torch.full((2, 2), 0.25))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_micro_steps_of_float64_without_the_nan_rule(state_dtype):
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Tiger([p], grad_accum_steps=2, shrink_ratio=None, state_dtype=state_dtype)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (p < 0).all()


# --- schedule -----------------------------------------------------------------------------------


def test_piecewise_linear():
    schedule = {100: 1.0, 200: 0.5}
    found = [piecewise_linear(t, schedule) for t in (0, 50, 100, 150, 200, 1000)]
    assert found == [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    assert [piecewise_linear(t, {0: 1}) for t in (0, 9)] == [1.0, 1.0]
    assert [piecewise_linear(t, {0: 0.5, 10: 1.0}) for t in (0, 5, 10)] == [0.5, 0.75, 1.0]
