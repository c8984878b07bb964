"""States that fit are taken, also lion-pytorch's and bitsandbytes'; others change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastlora.ops.sign_momentum import EightBit
from fastlora.optim import Lion, Tiger


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((80, 64), (5,))]


def lion_pytorch(params, momenta):
    return {
        "state": {i: {"exp_avg": m} for i, m in enumerate(momenta)},
        "param_groups": [
            {"lr": 3e-4, "betas": (0.95, 0.98), "weight_decay": 0.01, "params": [0, 1]}
        ],
    }


def momenta(params):
    torch.manual_seed(1)
    return [torch.randn(p.shape) for p in params]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion_pytorchs(dtype, state_dtype):
    params = parameters(dtype)
    given = momenta(params)
    optimizer = Lion(params, state_dtype=state_dtype)
    saved = lion_pytorch(params, given)
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.95, 0.98), 0.01)
    assert group["state_dtype"] == state_dtype
    for p, m in zip(params, given, strict=True):
        found = optimizer.state[p]["exp_avg"]
        if state_dtype == "8bit":
            assert torch.equal(found.codes, EightBit.from_float(m).codes)
        else:
            assert torch.equal(found, m.to(getattr(torch, state_dtype)))
        p.grad = torch.ones_like(p)
    optimizer.step()  # and what was loaded is not written to
    assert torch.equal(saved["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def bitsandbytes(params, given, block, wrapped):
    """As Lion8bit saves it: codes where a tensor has 4096 elements or more, else float32."""
    values = torch.linspace(-1, 1, 256)
    flat = given[0].flatten()
    blocks = -(-flat.numel() // block)
    padded = torch.cat([flat, flat.new_zeros(blocks * block - flat.numel())]).view(blocks, block)
    scales = padded.abs().amax(1)
    codes = ((padded / scales[:, None] + 1) * 127.5).round().to(torch.uint8).flatten()
    eight = {
        "state1": codes[: flat.numel()].view(given[0].shape), "qmap1": values, "absmax1": scales
    }  # fmt: skip
    states = [eight, {"state1": given[1]}]
    for state in states:
        state["step"] = 3
    if wrapped:
        states = [{"step": s.pop("step"), "__bnb_optimizer_quant_state__": s} for s in states]
    group = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.1, "alpha": 0.0}
    exact = (values[codes.long()].view(blocks, block) * scales[:, None]).flatten()
    return (
        {"state": dict(enumerate(states)), "param_groups": [{**group, "params": [0, 1]}]},
        exact[: flat.numel()].view(given[0].shape),
    )


@pytest.mark.parametrize("block", [256, 2048])
@pytest.mark.parametrize("wrapped", [False, True])
def test_bitsandbytes(block, wrapped):
    params = parameters()
    given = momenta(params)
    saved, exact = bitsandbytes(params, given, block, wrapped)
    optimizer = Lion(params)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], exact)
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], given[1])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    again = Lion(params)
    again.load_state_dict(optimizer.state_dict())


def test_another_state_dtype_is_converted():
    params = parameters()
    wide = Lion(params, state_dtype="float32")
    for p in params:
        p.grad = torch.randn_like(p)
    wide.step()
    for state_dtype in ("8bit", "bfloat16", "float32"):
        narrow = Lion(params, state_dtype=state_dtype)
        narrow.load_state_dict(wide.state_dict())
        back = Lion(params)
        back.load_state_dict(narrow.state_dict())
        # 8-bit codes near the largest are 2/127 of it apart, of which rounding loses half
        bound = {"8bit": 1 / 127, "bfloat16": 2**-8, "float32": 0.0}[state_dtype]
        for p in params:
            m, n = wide.state[p]["exp_avg"], back.state[p]["exp_avg"]
            assert (m - n).abs().max() <= bound * m.abs().max()


def test_user_hooks_see_and_change_the_state():
    params = parameters()
    optimizer, seen = Lion(params), []

    def rename(optimizer, state):
        return {
            **state,
            "state": {i: {"exp_avg": s["m"]} for i, s in state["state"].items()},
        }

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(
        lambda optimizer: seen.append(optimizer.state[params[0]]["exp_avg"].dtype)
    )
    saved = lion_pytorch(params, momenta(params))
    saved["state"] = {i: {"m": s["exp_avg"]} for i, s in saved["state"].items()}
    optimizer.load_state_dict(saved)
    assert seen == [torch.float32]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_scheduler_entries_are_kept():
    params = parameters()
    optimizer = Lion(params)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    again = Lion(params)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["initial_lr"] == 1e-4


def other_shape(state):
    state["state"][0]["exp_avg"] = torch.zeros(64, 80)


def fewer_parameters(state):
    state["param_groups"][0]["params"] = [0]


def two_groups(state):
    state["param_groups"].append({**state["param_groups"][0], "params": []})


def no_momentum(state):
    state["state"][0] = {"square_avg": torch.zeros(80, 64)}


def one_entry_more(state):
    state["state"][0]["exp_avg_sq"] = torch.zeros(80, 64)


def a_stranger(state):
    state["state"][5] = {"exp_avg": torch.zeros(2)}


def not_a_rate(state):
    state["param_groups"][0]["lr"] = float("nan")


def integers(state):
    state["state"][0]["exp_avg"] = torch.zeros(80, 64, dtype=torch.uint8)


def without_blocks(state):
    state["state"][0] = {
        "state1": torch.zeros(80, 64, dtype=torch.uint8), "qmap1": torch.zeros(256),
        "max1": torch.zeros(1), "new_max1": torch.zeros(1),
    }  # fmt: skip


def another_algorithm(state):
    state["param_groups"][0]["algorithm"] = "adamw"


def no_groups(state):
    del state["param_groups"]


def no_params(state):
    del state["param_groups"][0]["params"]


def not_a_count(state):
    state["param_groups"][0]["steps"] = "x"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (no_groups, "the state has no param_groups"),
        (no_params, "a group of the state has no params"),
        (not_a_count, "steps must be a whole number of at least 0"),
        (other_shape, r"momentum of parameter 0 of group 0 has shape \[64, 80\]"),
        (fewer_parameters, r"groups of \[1\] parameters, this optimizer of \[2\]"),
        (two_groups, r"groups of \[2, 0\] parameters"),
        (no_momentum, "no momentum"),
        (one_entry_more, "unknown entries: exp_avg_sq"),
        (a_stranger, "no parameter of this optimizer: 5"),
        (not_a_rate, "lr must be"),
        (integers, "momentum of parameter 0 of group 0 is torch.uint8"),
        (without_blocks, "has no blocks"),
        (another_algorithm, "updated by sign here, in the state by adamw"),
    ],
)
@pytest.mark.parametrize("make", [Lion, lambda params: Tiger(params)])
def test_what_does_not_fit_changes_nothing(make, spoil, expected):
    params = parameters()
    optimizer = make(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    spoil(state)
    with pytest.raises(ValueError, match=expected):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i in range(2):
        assert torch.equal(after["state"][i]["exp_avg"], before["state"][i]["exp_avg"])
    assert not optimizer._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("folded", "x", "folded gradients of parameter 0 of group 0 are counted as 'x'"),
        ("lost", [1, 0], "lost of parameter 0 of group 0 must be a tensor"),
        ("lost", torch.zeros(5), "lost of parameter 0 of group 0 must be a tensor"),
        ("rows", [True], "rows of parameter 0 of group 0 must be a bool tensor"),
    ],
)
def test_what_tiger_keeps_within_a_cycle_is_checked(key, value, expected):
    params = parameters()
    state = lion_pytorch(params, momenta(params))
    state["param_groups"][0] = {"params": [0, 1]}
    state["state"][0][key] = value
    with pytest.raises(ValueError, match=expected):
        Tiger(params).load_state_dict(state)


def test_groups_that_would_count_apart_are_refused():
    params = parameters()
    optimizer = Tiger([{"params": [p]} for p in params], grad_accum_steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][1]["grad_accum_steps"] = 3
    with pytest.raises(ValueError, match="same for all groups"):
        optimizer.load_state_dict(state)
    optimizer.param_groups[1]["grad_accum_steps"] = 3
    with pytest.raises(ValueError, match="same for all groups"):
        optimizer.step()
