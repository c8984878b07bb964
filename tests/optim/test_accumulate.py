"""Gradients folded into momentum during backward: the same training, without gradients."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import fastlora
from fastlora.optim import Lion, Tiger, accumulate_in_momentum, param_groups


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def model(seed=0, dtype=torch.float64, blocks=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(13, 8), *(Block(8) for _ in range(blocks))).to(dtype)


def ids(seed):
    return torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(seed))


def loss_of(net, seed):
    return net(ids(seed)).square().sum()


@pytest.mark.parametrize("lazy", [False, True])
def test_it_is_tiger_with_the_mean_gradient(lazy):
    folded, plain = model(), model()
    more = {"embedding": {"lazy_rows": lazy}}
    optimizer = Tiger(param_groups(folded, **more), grad_accum_steps=3, lr=1e-2)
    other = Tiger(param_groups(plain, **more), lr=1e-2)
    handle = accumulate_in_momentum(folded, optimizer)
    for step in range(5):
        for i in range(3):
            loss_of(folded, 3 * step + i).backward()
            assert all(p.grad is None for p in folded.parameters())
            (loss_of(plain, 3 * step + i) / 3).backward()
        optimizer.step()
        other.step()
        other.zero_grad()
        for p, q in zip(folded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert optimizer.param_groups[0]["steps"] == 15
    handle.detach()
    loss_of(folded, 0).backward()
    assert all(p.grad is not None for p in folded.parameters())


def test_divided_losses_are_added_up_and_a_short_cycle_is_no_error():
    nets = [model() for _ in range(3)]
    divided, mean, plain = (Tiger(param_groups(n), grad_accum_steps=k, lr=1e-2)
                            for n, k in zip(nets, (1, 4, 1), strict=True))  # fmt: skip
    accumulate_in_momentum(nets[0], divided, loss_is_divided=True)
    accumulate_in_momentum(nets[1], mean)
    for i in range(3):  # of 4
        (loss_of(nets[0], i) / 4).backward()
        loss_of(nets[1], i).backward()
        (loss_of(nets[2], i) / 4).backward()
    for optimizer in (divided, mean, plain):
        optimizer.step()
    for p, q, r in zip(*(n.parameters() for n in nets), strict=True):
        torch.testing.assert_close(p, r, rtol=0, atol=1e-12)
        torch.testing.assert_close(q, r, rtol=0, atol=1e-12)


def test_at_most_one_layers_gradients_are_alive():
    """Counted at every gradient that arrives, and against what others have at the end."""
    net = model(blocks=6)
    layers = [net[0], *(layer for block in net[1:] for layer in block.children())]
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
    alive = []

    def count(param):
        alive.append(sum(p.grad.nbytes for p in net.parameters() if p.grad is not None))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(count)  # before ours, so that it sees the gradient
    loss_of(net, 0).backward()
    full = max(alive)
    assert full == sum(p.nbytes for p in net.parameters())
    net.zero_grad()
    alive.clear()
    optimizer = Tiger(param_groups(net), grad_accum_steps=2)
    with accumulate_in_momentum(net, optimizer):
        for i in range(4):
            loss_of(net, i).backward()
            if i % 2:
                optimizer.step()
    assert len(alive) == 4 * len(list(net.parameters()))
    assert 0 < max(alive) <= largest < full / 4


def test_a_weight_used_twice_and_checkpointing():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, x):
            x = self.linear(x)
            return torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)

    nets = [Twice(), Twice()]
    tigers = [Tiger(net.parameters()) for net in nets]
    accumulate_in_momentum(nets[0], tigers[0])
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(4, 6, dtype=torch.float64)
        for net, tiger in zip(nets, tigers, strict=True):
            net(x).square().sum().backward()
            tiger.step()
            tiger.zero_grad()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_gradients_that_are_not_finite_wait_for_the_step(bad):
    """Momentum stays, parameters shrink at the step; after a bad last one they do only that."""
    net, plain = model(), model()
    optimizer = Tiger(param_groups(net), grad_accum_steps=3, lr=1e-2)
    other = Tiger(param_groups(plain), grad_accum_steps=3, lr=1e-2)
    accumulate_in_momentum(net, optimizer)
    weight = net[1].up.weight

    for cycle in range(2):
        before = weight.detach().clone()
        for i in range(3):
            spoil = cycle == 1 and i == bad

            def spoilt(g, spoil=spoil):
                return g * math.nan if spoil else g

            for n in (net, plain):
                hook = n[1].up.weight.register_hook(spoilt)
                loss_of(n, i).backward()
                hook.remove()
            if i < 2:
                assert torch.equal(weight, before)
            if spoil or i < 2:
                # the published rule shrinks at once, so that later gradients see it: keep it away
                kept = [p.detach().clone() for p in plain.parameters()]
                other.step()
                if i < 2:
                    with torch.no_grad():
                        for p, k in zip(plain.parameters(), kept, strict=True):
                            p.copy_(k)
            else:
                other.step()
            other.zero_grad()
        if cycle == 1 and bad < 2:
            with torch.no_grad():
                theirs = plain[1].up.weight
                m = other.state[theirs]["exp_avg"]
                shrunk = 0.99 * before
                theirs.copy_(
                    shrunk - 1e-2 * shrunk.square().mean().sqrt() * (m.sign() + 0.01 * shrunk)
                )
        optimizer.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"], rtol=0, atol=1e-12
        )
    if bad == 2:
        torch.testing.assert_close(weight.data, 0.99 * before)


def test_a_state_saved_within_a_cycle():
    nets = [model(), model()]
    optimizers = [Tiger(param_groups(n), grad_accum_steps=2) for n in nets]
    accumulate_in_momentum(nets[0], optimizers[0])
    loss_of(nets[0], 0).backward()
    saved = copy.deepcopy(optimizers[0].state_dict())
    accumulate_in_momentum(nets[1], optimizers[1])
    optimizers[1].load_state_dict(saved)
    for net, optimizer in zip(nets, optimizers, strict=True):
        loss_of(net, 1).backward()
        optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_adamw_groups_keep_their_gradients_until_the_step():
    net, plain = model(), model()
    own = {"embedding": {"algorithm": "adamw", "lr": 1e-2, "weight_decay": 0.1}}
    optimizer = Tiger(param_groups(net, **own), grad_accum_steps=2, lr=1e-2)
    other = Tiger(param_groups(plain, **own), lr=1e-2)
    accumulate_in_momentum(net, optimizer)
    for step in range(3):
        for i in range(2):
            loss_of(net, 2 * step + i).backward()
            (loss_of(plain, 2 * step + i) / 2).backward()
        assert net[0].weight.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        other.step()
        other.zero_grad()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("via", ["inject", "accelerate"])
def test_adapters_of_a_model(via, tiny_llama):
    """LoRA layers, ours and peft's with our kernels: equal to kept gradients' mean."""
    nets = []
    for _ in range(2):
        net = tiny_llama()
        if via == "inject":
            torch.manual_seed(1)
            fastlora.inject(net, fastlora.LoRAConfig(r=4))
        else:
            peft = pytest.importorskip("peft")
            torch.manual_seed(1)
            net = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules="all-linear"))
            fastlora.accelerate(net)
        nets.append(net)
    folding = Tiger(param_groups(nets[0]), grad_accum_steps=2, lr=1e-2)
    plain = Tiger(param_groups(nets[1]), lr=1e-2)
    accumulate_in_momentum(nets[0], folding)
    torch.manual_seed(2)
    batches = torch.randint(0, 96, (6, 2, 12))
    losses = [[], []]
    for i, batch in enumerate(batches):
        for which, net in enumerate(nets):
            loss = net(input_ids=batch, labels=batch).loss
            losses[which].append(float(loss.detach()))
            (loss if which == 0 else loss / 2).backward()
        if i % 2:
            folding.step()
            plain.step()
            plain.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("attach_first", [False, True])
def test_loaded_options_are_those_that_fold(attach_first):
    nets = [nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2)]
    trained, other = (
        Tiger(net.parameters(), beta=beta, grad_accum_steps=k)
        for net, beta, k in zip(nets, (0.5, 0.9), (4, 2), strict=True)
    )
    if attach_first:
        accumulate_in_momentum(nets[1], other)
    other.load_state_dict(copy.deepcopy(trained.state_dict()))
    if not attach_first:
        accumulate_in_momentum(nets[1], other)
    for _ in range(4):
        nets[1](torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert torch.equal(
        other.state[nets[1].weight]["exp_avg"], torch.full((3, 3), 0.5, dtype=torch.float64)
    )
    for group in other.param_groups:
        group["grad_accum_steps"] = 5
    nets[1](torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    other.step()
    assert other.param_groups[0]["steps"] == 5


def test_a_step_that_raises_moves_and_shrinks_nothing():
    net = nn.Linear(3, 3)
    optimizer = Tiger([{"params": [net.weight]}, {"params": [net.bias], "maximize": True}], lr=0.1)
    accumulate_in_momentum(net, optimizer)
    (net(torch.ones(1, 3)) * torch.tensor([math.nan, 1.0, 1.0])).sum().backward()
    before = net.weight.detach().clone()
    optimizer.param_groups[1]["backend"] = "none such"
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown backend"):
            optimizer.step()
        assert torch.equal(net.weight, before)
    optimizer.param_groups[1]["backend"] = None
    optimizer.step()
    torch.testing.assert_close(net.weight.data, 0.99 * before)


def test_after_an_error_in_the_block_plain_steps_go_on():
    net = nn.Linear(3, 3, bias=False)
    optimizer = Tiger(net.parameters(), beta=0.5)
    with pytest.raises(KeyError), accumulate_in_momentum(net, optimizer):
        net(torch.ones(1, 3)).sum().backward()
        raise KeyError
    for expected in (1.0, 1.0):  # a half, and a half of the first plain one; then their mean
        net.zero_grad()
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert optimizer.state[net.weight]["exp_avg"].eq(expected).all()
    accumulate_in_momentum(net, optimizer).detach()


def test_hooks_keep_neither_model_nor_optimizer():
    net = nn.Linear(3, 3)
    optimizer = Tiger(net.parameters())
    accumulate_in_momentum(net, optimizer)  # the optimizer keeps it
    net(torch.ones(1, 3)).sum().backward()
    assert net.weight.grad is None
    optimizer.step()
    gone = [weakref.ref(net.weight), weakref.ref(optimizer)]
    del net, optimizer
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_group_added_later_is_folded_too():
    net = nn.Sequential(nn.Linear(3, 3, bias=False))
    optimizer = Tiger(net.parameters(), grad_accum_steps=2)
    handle = accumulate_in_momentum(net, optimizer)
    net.append(nn.Linear(3, 3, bias=False))
    optimizer.add_param_group({"params": net[1].parameters()})
    before = net[1].weight.detach().clone()
    for _ in range(2):
        net(torch.ones(1, 3)).sum().backward()
        assert net[1].weight.grad is None
    optimizer.step()
    assert not torch.equal(net[1].weight, before)
    with pytest.raises(ValueError, match="lazy_momentum needs"):
        more = {"params": [nn.Parameter(torch.ones(2, 2))], "lazy_rows": True}
        optimizer.add_param_group({**more, "lazy_momentum": True})
    handle.detach()
    net(torch.ones(1, 3)).sum().backward()
    assert net[1].weight.grad is not None


def test_detaching_makes_no_states():
    net = model()
    optimizer = Tiger(net.parameters())
    accumulate_in_momentum(net, optimizer).detach()
    assert not optimizer.state


@pytest.mark.parametrize("view", [lambda t: t[:1].expand(3), torch._neg_view])
def test_gradients_given_by_hand_may_be_views(view):
    p = nn.Parameter(torch.zeros(3))
    optimizer = Tiger([p], beta=0.5)
    accumulate_in_momentum(nn.ParameterList([p]), optimizer)
    p.grad = view(torch.ones(3))
    wanted = 0.5 * p.grad.clone()
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], wanted)


# --- refusals ----------------------------------------------------------------------------------


def test_a_step_left_out_is_an_error_and_changes_nothing():
    net = model()
    optimizer = Tiger(param_groups(net), grad_accum_steps=2)
    accumulate_in_momentum(net, optimizer)
    loss_of(net, 0).backward()
    loss_of(net, 1).backward()
    kept = [optimizer.state[p]["exp_avg"].clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"after 2 micro-steps without a step"):
        loss_of(net, 2).backward()
    for p, m in zip(net.parameters(), kept, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], m)
    net.zero_grad()
    optimizer.step()
    loss_of(net, 3).backward()


def test_what_cannot_be_attached():
    net = model()
    with pytest.raises(TypeError, match="Tiger, not of Lion"):
        accumulate_in_momentum(net, Lion(net.parameters()))
    with pytest.raises(TypeError, match="Tiger, not of SGD"):
        accumulate_in_momentum(net, torch.optim.SGD(net.parameters()))
    with pytest.raises(ValueError, match=r"0\.weight is trained, but not one of"):
        accumulate_in_momentum(net, Tiger(net[1].parameters()))
    lazy = Tiger(net.parameters(), lazy_rows=True, lazy_momentum=True)
    with pytest.raises(ValueError, match="lazy_momentum"):
        accumulate_in_momentum(net, lazy)
    optimizer = Tiger(net.parameters())
    handle = accumulate_in_momentum(net, optimizer)
    with pytest.raises(RuntimeError, match="already"):
        accumulate_in_momentum(net, optimizer)
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="call step first"):
        handle.detach()
    optimizer.step()
    handle.detach()
    with pytest.raises(RuntimeError, match="detached already"):
        handle.detach()


def test_a_step_before_any_backward_does_nothing():
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = Tiger(param_groups(net), grad_accum_steps=2)
    with accumulate_in_momentum(net, optimizer):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
