"""The bench of optimizers: what is run, what is chosen, what is a failure."""

from __future__ import annotations

import json

import pytest
import torch

from bench import optimizers as bench


def run_of(name, lr, seed, held_out):
    return {"held_out": held_out, "loss": [3.0, held_out], "state_bytes": 8, "start": 3.0}


def all_runs(losses):
    runs = {}
    for name, grid in bench.GRIDS.items():
        for i, lr in enumerate(grid):
            runs[name, lr, 0] = run_of(name, lr, 0, 2.0 + abs(i - 1))
    for name in bench.MAKE:
        lr = bench.best(runs, name if name == "adamw" else f"{name.split()[0]} float32")
        runs[name, lr, 1] = run_of(name, lr, 1, losses.get(name, 2.0))
    return runs


def test_rates_rise_and_fall_to_zero():
    found = [bench.factor(step, 20) for step in range(20)]
    assert found[0] == pytest.approx(0.2) and max(found[:5]) == found[4]
    assert found[-1] == pytest.approx(0.05) and found[5:] == sorted(found[5:], reverse=True)


def test_first_the_grids_then_other_orders_at_the_best_rate():
    assert {name for name, _, _ in bench.wanted({}, 2)} == set(bench.GRIDS)
    runs = {key: run for key, run in all_runs({}).items() if key[2] == 0}
    todo = bench.wanted(runs, 2)
    assert len(todo) == 2 * len(bench.MAKE)
    assert ("tiger 8bit", bench.GRIDS["tiger float32"][1], 2) in todo
    assert bench.wanted(all_runs({}), 1) == []


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, []),
        ({"lion float32": 2.1, "lion 8bit": 2.1, "lion bfloat16": 2.1}, ["lion float32's loss"]),
        ({"tiger 8bit": 1.9}, ["tiger 8bit's loss is 0.9500 times that with float32"]),
    ],
)
def test_failures(losses, expected):
    said = bench.failures(bench.summary(all_runs(losses), 1))
    assert len(said) == len(expected)
    assert all(sentence.startswith(start) for sentence, start in zip(said, expected, strict=True))


def test_a_run_trains_and_counts_its_state(tiny_llama):
    batch = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    sizes = {}
    for name in ("adamw", "tiger float32", "tiger 8bit"):
        net = tiny_llama()
        rate = 1e-2 if name == "adamw" else 3e-2
        run = bench.train(net, bench.MAKE[name], rate, [batch] * 8, [batch])
        assert run["held_out"] < run["loss"][0] - 0.3
        sizes[name] = run["state_bytes"]
        json.dumps(run)
    parameters = sum(p.numel() for p in net.parameters())
    assert sizes["tiger float32"] == 4 * parameters
    assert sizes["adamw"] == 8 * parameters + 4 * len(list(net.parameters()))
    assert parameters < sizes["tiger 8bit"] < 1.1 * parameters
