"""Lion against its published update, and torch.optim's conventions."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from fastlora.ops.sign_momentum import EightBit
from fastlora.optim import Lion
from tests.optim.published import Lion as Published

SHAPES = [(7, 5), (3,), (4, 2, 3), (), (0, 4), (130, 9)]


def tensors(seed=0, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def parameters(seed=0, dtype=torch.float32, shapes=SHAPES):
    return [nn.Parameter(t) for t in tensors(seed, dtype, shapes)]


def give(params, seed, scale=1.0):
    grads = tensors(seed, params[0].dtype, [p.shape for p in params])
    for p, g in zip(params, grads, strict=True):
        p.grad = g * scale
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_published_trajectory(dtype):
    ours, theirs = parameters(dtype=dtype), tensors(dtype=dtype)
    optimizer = Lion(ours, lr=3e-3, betas=(0.95, 0.98), weight_decay=0.1)
    published = Published(theirs, 3e-3, (0.95, 0.98), 0.1)
    for step in range(1, 101):
        published.step(give(ours, step))
        optimizer.step()
        for p, q, m in zip(ours, theirs, published.m, strict=True):
            torch.testing.assert_close(
                p.data, q, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13
            )
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-5, atol=1e-6)


def test_a_step_is_lr_and_the_scale_of_gradients_does_not_matter():
    steps = []
    for scale in (1.0, 1e-6, 1e6):
        params = parameters()
        before = [p.detach().clone() for p in params]
        optimizer = Lion(params, lr=1e-3)
        give(params, 1, scale)
        optimizer.step()
        steps.append([p.detach() - b for p, b in zip(params, before, strict=True)])
        for step in steps[-1]:
            torch.testing.assert_close(step.abs(), torch.full_like(step, 1e-3), rtol=0, atol=3e-7)
    for other in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[0], other, strict=True))


def test_zero_gradients_and_none():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = Lion(params, lr=1.0)
    give(params, 1, 0.0)
    params[0].grad = None
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert params[0] not in optimizer.state


def test_groups_have_options_of_their_own():
    a, b, c = parameters(shapes=[(3, 3)] * 3)
    optimizer = Lion(
        [
            {"params": [("a", a)], "lr": 0.5, "betas": (0.0, 0.5)},
            {"params": [("b", b)], "maximize": True},
        ],
        lr=0.25,
    )
    optimizer.add_param_group({"params": [("c", c)], "weight_decay": 1.0})
    before = [p.detach().clone() for p in (a, b, c)]
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(a.data, before[0] - 0.5)
    torch.testing.assert_close(b.data, before[1] + 0.25)
    torch.testing.assert_close(c.data, 0.75 * before[2] - 0.25)
    torch.testing.assert_close(optimizer.state[a]["exp_avg"], torch.full((3, 3), 0.5))
    assert optimizer.param_groups[2]["param_names"] == ["c"]


def test_closure_hooks_and_scheduler():
    params = parameters(shapes=[(4,)])
    optimizer = Lion(params, lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = params[0].detach().clone()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = params[0].sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before.sum()
    schedule.step()
    optimizer.step(closure)
    torch.testing.assert_close(params[0].data, before - 0.15)
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("capturable", [False, True])
def test_lr_in_a_tensor_follows_its_value(capturable):
    params = parameters(shapes=[(4,), (2, 2)])
    lr = 0.5 if capturable else torch.tensor(0.5)
    optimizer = Lion(params, lr=lr, capturable=capturable)
    before = [p.detach().clone() for p in params]
    for value in (0.5, 0.25):
        optimizer.param_groups[0]["lr"].fill_(value)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.data, b - 0.75)
    again = Lion(params, lr=1.0, capturable=capturable)
    again.load_state_dict(optimizer.state_dict())
    assert isinstance(again.param_groups[0]["lr"], torch.Tensor)
    assert again.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_resumed_run_goes_on_exactly(dtype, state_dtype, stochastic):
    options = {"lr": 1e-2, "weight_decay": 0.1, "state_dtype": state_dtype, "seed": 7}
    straight = parameters(dtype=dtype)
    optimizer = Lion(straight, stochastic_rounding=stochastic, **options)
    for step in range(4):
        give(straight, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": straight}, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Parameter]):
        saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach().clone()) for p in saved["params"]]
    again = Lion(resumed, lr=9.0, stochastic_rounding=stochastic, state_dtype=state_dtype)
    again.load_state_dict(saved["optimizer"])
    for step in range(4, 9):
        for params, each in ((straight, optimizer), (resumed, again)):
            give(params, step)
            each.step()
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)
        m, n = optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"]
        if state_dtype == "8bit":
            assert torch.equal(m.codes, n.codes) and torch.equal(m.scales, n.scales)
            assert m.codes.data_ptr() != n.codes.data_ptr() or not m.numel()
        else:
            assert torch.equal(m, n) and m.dtype == state_dtype


def test_stochastic_rounding_keeps_steps_below_the_spacing():
    moved = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = Lion([p], lr=1e-4, stochastic_rounding=stochastic, seed=3)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[stochastic] = float(1 - p.detach().float().mean())
    assert moved[False] == 0.0
    # 100 steps of 1e-4, each 2⁻⁸ (the spacing below 1) with probability 0.0256: the mean of 4096
    # sums has a standard deviation of 0.0039 · √(100 · 0.0256 / 4096) = 1e-4
    assert abs(moved[True] - 1e-2) < 5e-4


def test_copies_and_pickles_go_on():
    params = parameters()
    optimizer = Lion(params, lr=1e-2, state_dtype="8bit")
    give(params, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for other in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        theirs = other.param_groups[0]["params"]
        give(theirs, 1)
        other.step()
        give(params, 1)
        assert isinstance(other.state[theirs[0]]["exp_avg"], EightBit)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))


def test_versions_are_bumped():
    """What caches by a tensor's version, as DoRA's norm does, sees that it has moved."""
    p = nn.Parameter(torch.ones(300))
    optimizer = Lion([p])
    p.grad = torch.ones_like(p)
    before = p._version
    optimizer.step()
    assert p._version > before


def test_autograd_still_refuses_a_graph_over_changed_parameters():
    p = nn.Parameter(torch.ones(3))
    optimizer = Lion([p], lr=0.1)
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": -1e-3}, "lr must be a finite number"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": float("inf")}, "lr must be a finite number"),
        ({"lr": 10**400}, "lr must be a finite number"),
        ({"betas": (10**400, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"lr": torch.tensor(float("nan"))}, "lr must be a finite number"),
        ({"lr": torch.ones(2)}, "one floating-point number"),
        ({"lr": torch.tensor([1e-3])}, "have no axes"),
        ({"stochastic_rounding": True, "seed": None}, "seed must be a whole number"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9, float("nan"))}, r"betas must be in \[0, 1\)"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"state_dtype": torch.float16}, "state_dtype must be one of"),
        ({"algorithm": "sgd"}, "algorithm must be one of"),
        ({"lazy_momentum": True}, "give both"),
        ({"capturable": True, "stochastic_rounding": True}, "exclude each other"),
        ({"differentiable": True}, "cannot be differentiated"),
        ({"algorithm": "adamw", "lazy_rows": True}, "no need of it"),
        ({"algorithm": "adamw", "adam_betas": (0.9, 2.0)}, "adam_betas must be in"),
    ],
)
def test_refused_options(options, expected):
    with pytest.raises(ValueError, match=expected):
        Lion(parameters(), **options)


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        (nn.Parameter(torch.zeros(2, dtype=torch.complex64)), "complex"),
        (torch.zeros(2, dtype=torch.int64), "int64"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch._neg_view(torch.ones(2)), "negated view"),
        ("x", "not a tensor"),
    ],
)
def test_refused_parameters(param, expected):
    optimizer = Lion(parameters())
    with pytest.raises(TypeError, match=expected):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def broken_lr(optimizer, params):
    optimizer.param_groups[1]["lr"] = float("nan")


def resized(optimizer, params):
    params[-1].grad = None
    params[-1].data = torch.zeros(2, 2)
    params[-1].grad = torch.ones(2, 2)


def stale_gradient(optimizer, params):
    params[-1].data = params[-1].data[:1]


def freed(optimizer, params):
    params[-1].untyped_storage().resize_(0)


def sparse_for_adamw(optimizer, params):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "algorithm": "adamw"})
    optimizer.param_groups[-1]["params"][0].grad = torch.ones(2, 2).to_sparse(1)


def on_another_device(optimizer, params):
    state = optimizer.state[params[-1]]
    state["exp_avg"] = state["exp_avg"].to("meta")


def freed_gradient(optimizer, params):
    params[-1].grad.untyped_storage().resize_(0)


def freed_momentum(optimizer, params):
    optimizer.state[params[-1]]["exp_avg"].untyped_storage().resize_(0)


def no_such_backend(optimizer, params):
    optimizer.param_groups[1]["backend"] = "none such"


def twice_the_memory(optimizer, params):
    optimizer.state[params[-1]]["exp_avg"] = params[-1].data


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (freed_gradient, "memory of the gradient of parameter 1 of group 1 has been freed"),
        (freed_momentum, "memory of the momentum of parameter 1 of group 1 has been freed"),
        (no_such_backend, "unknown backend"),
        (twice_the_memory, "occurs twice"),
        (broken_lr, "lr must be"),
        (resized, "resized"),
        (stale_gradient, "but its (momentum|gradient)"),
        (freed, "freed"),
        (sparse_for_adamw, "sparse gradient"),
        (on_another_device, "its momentum on meta"),
    ],
)
def test_a_step_that_raises_changes_nothing(spoil, expected):
    params = parameters(shapes=[(4, 3), (5, 2), (3, 3)])
    optimizer = Lion([{"params": params[:1]}, {"params": params[1:], "betas": (0.5, 0.5)}], lr=0.1)
    for step in range(2):
        give(params, step)
        optimizer.step()
    give(params, 3)
    spoil(optimizer, params)
    kept = [(t, t.clone()) for p in params[:2] for t in (p.data, optimizer.state[p]["exp_avg"])]
    with pytest.raises((ValueError, RuntimeError), match=expected):
        optimizer.step()
    assert all(torch.equal(now, then) for now, then in kept)
    assert optimizer.param_groups[0]["steps"] == 2


def test_what_is_wrong_with_adamws_changes_no_other_group():
    params = parameters(shapes=[(4,), (4,)])
    optimizer = Lion([{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}])
    give(params, 0)
    optimizer.step()
    params[1].grad = None
    params[1].data = torch.zeros(6)
    give(params, 1)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"has shape \[6\] but its exp_avg \[4\]"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("spoil", [resized, stale_gradient, freed], ids=lambda f: f.__name__)
def test_and_so_in_one_call(spoil):
    """One group alone, which is handed to the operation as it is."""
    params = parameters(shapes=[(4, 3), (5, 2), (3, 3)])
    optimizer = Lion(params, lr=0.1)
    for step in range(2):
        give(params, step)
        optimizer.step()
    give(params, 3)
    spoil(optimizer, params)
    kept = [(p, p.detach().clone()) for p in params[:2]]
    with pytest.raises(ValueError, match=r"resized|but its|freed"):
        optimizer.step()
    assert all(torch.equal(now, then) for now, then in kept)


def test_a_momentum_that_was_replaced_is_the_one_that_is_used():
    p = nn.Parameter(torch.zeros(4))
    optimizer = Lion([p], lr=0.1, betas=(0.5, 0.5))
    for m in (torch.ones(4), -torch.ones(4)):
        optimizer.state[p]["exp_avg"] = m
        p.grad = torch.zeros(4)
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(p.data, before - 0.1 * m.sign())


def test_numbers_of_numpy_and_an_empty_group():
    numpy = pytest.importorskip("numpy")
    p = nn.Parameter(torch.zeros(4))
    optimizer = Lion(
        [{"params": []}, {"params": [p]}], lr=numpy.float32(0.5), stochastic_rounding=True
    )
    for step in (1, 2):
        p.grad = torch.ones(4)
        optimizer.step()
        assert p.tolist() == [-0.5 * step] * 4


def test_betas_that_change_at_every_step_keep_no_memory():
    a, b = parameters(shapes=[(4,), (4,)])
    optimizer = Lion([{"params": [a]}, {"params": [b]}])
    kept = []
    for step in range(6):
        give([a, b], step)
        for number, group in enumerate(optimizer.param_groups):
            group["betas"] = (0.9 - 0.01 * step, 0.9 + 0.01 * number)
        optimizer.step()
        kept.append(len(optimizer._caches))
    assert kept[-1] == kept[0]
