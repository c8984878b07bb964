"""The checks of bench.init hold on a tiny model, and see what is wrong."""

import copy

import pytest
import torch

from bench import init
from fastlora.adapters import layers

pytest.importorskip("peft")


def test_the_checks_pass_and_fail(tiny_llama, capsys):
    base = tiny_llama()
    mine = init.ours(copy.deepcopy(base), 4, "pissa_niter_4")
    other = init.theirs(copy.deepcopy(base), 4, "pissa_niter_4")
    assert init.check(base, mine, other) == []
    assert "14 layers; logits off by" in capsys.readouterr().out
    spoiled = layers(mine)[3]
    with torch.no_grad():
        spoiled.weight[0, 0] += 1.0
    wrong = init.check(base, mine, other)
    assert len(wrong) == 4 and wrong[0].startswith(f"{spoiled.name}: W_res + sBA is off by")
    assert wrong[1].startswith(f"{spoiled.name}: ‖W_res‖ is")
    assert wrong[2].startswith("the logits are off") and "of all" in wrong[3]
