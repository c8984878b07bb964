"""Every method trained beside peft's: the losses agree at each step, checkpointed or not."""

import copy

import pytest
import torch

import fastlora
from fastlora.adapters import layers
from tests.adapters.family import IDS, METHODS, PROJECTIONS, ours, peft_config

peft = pytest.importorskip("peft")
STEPS = 5


def trained(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = (IDS + step) % 96
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_pefts_step_by_step(tiny_llama, method, checkpointing):
    base = tiny_llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(method, PROJECTIONS))
    mine = copy.deepcopy(base)
    fastlora.inject(mine, ours(method, PROJECTIONS))
    with torch.no_grad():
        for layer, other in zip(layers(mine), layers(theirs), strict=True):
            assert layer.name == other.name
            for part, tensor in layer.tensors.items():
                tensor.copy_(other.tensors[part])
    for model in (theirs, mine):
        model.train()
        model.enable_input_require_grads()
    if checkpointing:
        mine.gradient_checkpointing_enable({"use_reentrant": False})
    losses = trained(mine)
    assert losses == pytest.approx(trained(theirs), rel=1e-4) and losses[-1] != losses[0]
