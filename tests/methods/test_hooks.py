"""What the methods on an optimizer's step hooks have in common: which optimizer, GradScaler."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdaLoRAConfig, LoRAConfig
from fastlora.adapters import layers
from fastlora.methods import AdaLoRA, LoRAFA, LoRAPro
from fastlora.optim import Tiger, accumulate_in_momentum, param_groups

LORA = LoRAConfig(r=3, lora_alpha=5)
ADALORA = AdaLoRAConfig(init_r=4, target_r=2, total_step=20)
METHODS = [(LoRAPro, LORA), (LoRAFA, LORA), (AdaLoRA, ADALORA)]
CORRECTIONS = METHODS[:2]
X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


def make(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
    fastlora.inject(model, config)
    with torch.no_grad():
        for layer in layers(model):
            for tensor in layer.tensors.values():
                tensor.normal_()
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model, **options):
    return torch.optim.AdamW(trained(model), 1e-2, **options)


def loss(model):
    return model(X).square().sum()


# --- GradScaler --------------------------------------------------------------------------------


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("method, config", METHODS)
def test_a_fused_step_that_overflows_is_left_out(method, config, unscaled):
    model = make(config)
    optimizer = adamw(model, fused=True)
    method = method().attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before, lora_B = copy.deepcopy(model.state_dict()), layers(model)[0].lora_B.clone()
    scaler.scale(loss(model)).backward()
    assert not all(p.grad.isfinite().all() for p in trained(model))
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert getattr(method, "step", 0) == 0
    # and with a scale that fits, it goes on
    optimizer.zero_grad()
    scaler.update(new_scale=2.0)
    scaler.scale(loss(model)).backward()
    scaler.step(optimizer)
    assert not torch.equal(layers(model)[0].lora_B, lora_B)
    assert getattr(method, "step", 1) == 1


class Unwritten(torch.optim.SGD):
    """Takes GradScaler's scale out as it steps, and leaves gradients as they were."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None):
        scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad if scale is None else p.grad / scale, alpha=group["lr"])


@pytest.mark.parametrize(
    "method, config, kind, options",
    [
        (lambda: LoRAPro("full"), LORA, torch.optim.SGD, {"fused": True}),
        (LoRAPro, LORA, torch.optim.AdamW, {"fused": True}),
        (LoRAFA, LORA, torch.optim.AdamW, {"fused": True}),
        (AdaLoRA, ADALORA, Unwritten, {}),
    ],
)
def test_a_scale_that_is_left_to_the_optimizer_does_not_show(method, config, kind, options):
    runs = []
    for scale in (1.0, 2.0**20):
        model = make(config)
        optimizer = kind(trained(model), lr=1e-3, **options)
        attached = method().attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        state = getattr(attached, "state_dict", dict)()
        runs.append((model.state_dict(), state.get("averages"), state.get("moments")))
    torch.testing.assert_close(runs[1], runs[0])


# --- which optimizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("method, config", METHODS)
def test_the_optimizer_may_be_accelerates(method, config):
    accelerate = pytest.importorskip("accelerate")
    stepped = []
    for wrap in (False, True):
        model = make(config)
        optimizer = adamw(model)
        if wrap:
            model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
        method().attach(model, optimizer)
        loss(model).backward()
        optimizer.step()
        stepped.append(model.state_dict())
    torch.testing.assert_close(stepped[1], stepped[0], atol=0, rtol=0)


@pytest.mark.parametrize("method, config", METHODS)
def test_what_the_optimizer_does_not_have_is_refused(method, config):
    model = make(config)
    some = [p for name, p in model.named_parameters() if p.requires_grad and name[0] == "0"]
    with pytest.raises(ValueError, match=r"lora_.* of 2 is not the optimizer's"):
        method().attach(model, torch.optim.SGD(some, 0.1))
    assert all(layer.lora_A.requires_grad for layer in layers(model))


@pytest.mark.parametrize("method, config", METHODS)
def test_one_method_a_layer(method, config):
    model, other = make(config), make(config)
    optimizer = torch.optim.SGD(trained(model) + trained(other), 0.1)
    first = method().attach(model, optimizer)
    with pytest.raises(RuntimeError, match=f"0 has a {method.__name__} on this optimizer already"):
        method().attach(model, optimizer)
    method().attach(other, optimizer)  # of other layers
    first.detach()
    method().attach(model, optimizer)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method, config", CORRECTIONS)
def test_a_step_without_any_gradient_is_refused(method, config):
    model = make(config)
    optimizer = adamw(model)
    method().attach(model, optimizer)
    with pytest.raises(RuntimeError, match=r"no layer of LoRA-.* has a gradient"):
        optimizer.step()


@pytest.mark.parametrize("method, config", CORRECTIONS)
def test_gradients_that_are_folded_away_are_noticed(method, config):
    model = make(config)
    tiger = Tiger(param_groups(model))
    method().attach(model, tiger)
    accumulate_in_momentum(model, tiger)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="accumulate_in_momentum"):
        tiger.step()


# --- the names that the README writes ----------------------------------------------------------

SCRIPT = """
import sys, fastlora
assert not {"fastlora.methods", "fastlora.optim"} & sys.modules.keys()
assert {"methods", "optim", "accelerate", "inject"} <= set(dir(fastlora))
fastlora.methods.AdaLoRA, fastlora.methods.LoRAPro, fastlora.methods.lora_ga
fastlora.optim.Lion, fastlora.optim.Tiger, fastlora.optim.param_groups
fastlora.nothing
"""


def test_methods_and_optim_come_with_the_package_when_they_are_used():
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert "module 'fastlora' has no attribute 'nothing'" in out.stderr
