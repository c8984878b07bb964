"""Under GradScaler, accelerate and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora.optim import Lion, Tiger, param_groups

MAKERS = {
    "lion": lambda net, **o: Lion(net.parameters(), lr=1e-2, **o),
    "tiger": lambda net, **o: Tiger(param_groups(net), lr=1e-2, **o),
}


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def batch(step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_gradient_scaler_unscales_and_skips(make):
    net, plain = build(), build()
    optimizer, other = make(net), make(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(8):
        bad = step in (2, 5)
        loss = net(batch(step)).square().mean()
        scaler.scale(loss * float("inf") if bad else loss).backward()
        before = [p.detach().clone() for p in net.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
            continue
        plain(batch(step)).square().mean().backward()
        other.step()
        other.zero_grad()
    assert scaler.get_scale() == 2.0**8  # halved twice
    assert equal(net, plain)
    assert optimizer.param_groups[0]["steps"] == 6


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("k", [1, 2])
def test_accelerate(make, k, tmp_path):
    """A prepared loop, accumulation, and a checkpoint in the middle, against the plain loop."""
    accelerate = pytest.importorskip("accelerate")
    net, plain = build(), build()
    other = make(plain)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=k, project_dir=str(tmp_path)
    )
    wrapped, optimizer = accelerator.prepare(net, make(net))
    for step in range(8):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(batch(step)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        (plain(batch(step)).square().mean() / k).backward()
        if (step + 1) % k == 0:
            other.step()
            other.zero_grad()
        if step == 3:
            accelerator.save_state(str(tmp_path / "state"))
            accelerator.load_state(str(tmp_path / "state"))
    assert equal(accelerator.unwrap_model(wrapped), plain)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_training_step(make, whole):
    """The model alone, or the step with the optimizer in it, which runs as it is."""
    net, plain = build(), build()
    optimizer, other = make(net), make(plain)

    def step(model, each, x):
        loss = model(x).square().mean()
        loss.backward()
        each.step()
        each.zero_grad()
        return loss.detach()

    if whole:
        compiled = torch.compile(step, backend="aot_eager")
        model = net
    else:
        compiled, model = step, torch.compile(net, backend="aot_eager")
    for i in range(5):
        torch.testing.assert_close(
            compiled(model, optimizer, batch(i)), step(plain, other, batch(i))
        )
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
