"""bench.convergence: its figures, its file of runs, and a sweep over a tiny model."""

import json
import math
import types

import pytest
import torch

from bench import convergence
from bench.convergence import CONTENDERS, Start, next_rate, read_runs, smoothed, steps_to, summary
from fastlora.cli.demo.data import Batches

pytest.importorskip("transformers")


def ids(count, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    # a text with something to learn: each token follows from the one before
    rows = [torch.randint(96, (batch, 1), generator=generator)]
    for _ in range(11):
        rows.append((rows[-1] * 5 + 7) % 96)
    whole = torch.cat(rows, 1)
    return [whole[torch.randperm(batch, generator=generator)] for _ in range(count)]


# --- figures -----------------------------------------------------------------------------------


def test_steps_to_is_taken_between_measurements():
    curve = {0: 4.0, 10: 3.0, 20: 2.5, 30: 2.6}
    assert steps_to(3.0, curve) == 10
    assert steps_to(2.75, curve) == pytest.approx(15)
    assert steps_to(4.5, curve) == 0
    assert steps_to(2.4, curve) is None
    assert steps_to(2.5, {30: 2.6, 0: 4.0, 20: 2.5, 10: 3.0}) == 20


def test_smoothed_looks_back_only():
    losses = [float(n) for n in range(15)]
    assert smoothed(losses)[:3] == [0.0, 0.5, 1.0]
    assert smoothed(losses)[-1] == pytest.approx(sum(range(5, 15)) / 10)


def test_rates_are_tried_from_the_middle_until_neither_neighbour_is_better():
    rates = [1.0, 2.0, 4.0, 8.0, 16.0]
    losses = {}
    assert next_rate(losses, rates) == 4.0
    losses[4.0] = 3.0
    assert next_rate(losses, rates) == 8.0
    losses[8.0] = math.inf
    assert next_rate(losses, rates) == 2.0
    losses[2.0] = 2.5
    assert next_rate(losses, rates) == 1.0
    losses[1.0] = 2.6
    assert next_rate(losses, rates) is None
    losses = {4.0: 3.0, 8.0: 2.0, 16.0: 1.0}  # the end of the grid
    assert next_rate(losses, rates) is None


def finished(method, lr, seed, held_out, lost=None):
    return {
        "method": method, "lr": lr, "seed": seed, "held_out": held_out, "lost": lost,
        "loss": [3.0, 2.0], "scaling": 2.0, "seconds": 1.0,
    }  # fmt: skip


def test_summary_compares_with_lora_seed_by_seed():
    runs = [
        finished("lora", 0.1, 0, {2: 2.5}),
        finished("lora", 0.2, 0, {2: 2.9}),
        finished("lora", 0.1, 1, {0: 4.0, 10: 3.0, 20: 2.0}),
        finished("lora", 0.1, 2, {0: 4.0, 10: 3.0, 20: 3.0}),
        finished("pissa", 0.1, 0, {2: 2.5}, lost=2),  # however low its last measurement was
        finished("pissa", 0.2, 0, {2: 2.9}),
        finished("pissa", 0.2, 1, {0: 4.0, 10: 2.0, 20: 1.5}),
        finished("pissa", 0.2, 2, {0: 4.0, 10: 3.5, 20: 3.25}),
    ]
    found = summary(runs, ["lora", "pissa"], [0.1, 0.2, 0.4], 2)
    assert (found["lora"]["lr"], found["pissa"]["lr"]) == (0.1, 0.2)
    assert found["lora"]["to_lora"] == [20, 10]
    assert found["pissa"]["to_lora"] == [10, None]
    assert found["pissa"]["below_lora"] == [0.5, -0.25]
    assert found["pissa"]["tuning"] == {"0.1": math.inf, "0.2": 2.9}
    assert convergence.table(found, 20).splitlines()[2].split()[-2:] == ["10,", "never"]
    rows = [line.split() for line in convergence.rates_table(found).splitlines()]
    assert rows[0][-2:] == ["0.1", "0.2"]
    assert rows[1] == ["LoRA", "2.500", "2.900"] and rows[2] == ["PiSSA", "lost", "2.900"]
    with pytest.raises(ValueError, match="pissa lacks runs"):
        summary(runs, ["pissa"], [0.1, 0.2, 0.4], 3)


# --- the file of runs --------------------------------------------------------------------------


def test_a_line_that_was_cut_off_is_dropped_from_the_file(tmp_path):
    file = tmp_path / "runs.jsonl"
    assert read_runs(file, {}) == []
    whole = json.dumps(finished("lora", 0.1, 0, {2: 2.5}) | {"settings": {"steps": 2}}) + "\n"
    other = whole.replace('"steps": 2', '"steps": 3')
    file.write_text(whole + other + whole[:40])
    (run,) = read_runs(file, {"steps": 2})
    assert run["held_out"] == {2: 2.5}
    assert file.read_text() == whole + other


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_method_starts_at_the_base_models_function_and_learns(name, tiny_llama):
    base = tiny_llama().requires_grad_(False)
    batches, held_out = ids(30, 0), ids(2, 0)
    first = float(convergence.loss_of(base, batches[0]))
    start = Start(base, CONTENDERS[name], 4, 1, batches)
    run = start.run(2e-3, batches, held_out, every=10)
    assert run["loss"][0] == pytest.approx(first, rel=1e-5)
    assert sorted(run["held_out"]) == [0, 10, 20, 30] and run["lost"] is None
    assert run["held_out"][30] < run["held_out"][0] - 0.1
    again = start.run(2e-3, batches, held_out, every=10)  # from the same adapters
    assert again["loss"] == run["loss"]
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("added", [[0.0, 1.9, 2.1], [0.0, 1.0, math.nan]])
def test_a_run_that_rises_is_given_up(tiny_llama, monkeypatch, added):
    """What a rate far too high comes to depends on the processor, so the loss is made to rise."""
    start = Start(tiny_llama().requires_grad_(False), CONTENDERS["lora"], 4, 1, [])
    loss_of, more = convergence.loss_of, iter(added)
    monkeypatch.setattr(convergence, "loss_of", lambda *what: loss_of(*what) + next(more))
    run = start.run(1e-6, ids(20, 0), ids(1, 0), every=20)
    assert run["lost"] == 3 and len(run["loss"]) == 2 and convergence.final(run) == math.inf


def test_a_sweep_goes_on_where_it_stopped(tiny_llama, monkeypatch, tmp_path, capsys):
    source = types.SimpleNamespace(title="tiny")
    monkeypatch.setattr(convergence.model, "find", lambda name: source)
    monkeypatch.setattr(convergence.model, "load_tokenizer", lambda source: None)
    monkeypatch.setattr(
        convergence.model, "load", lambda *_: tiny_llama().requires_grad_(False).eval()
    )
    monkeypatch.setattr(convergence.data, "read", lambda path: source)
    monkeypatch.setattr(
        convergence.data,
        "batches",
        lambda _, __, steps, batch, seq_len, seed: Batches(ids(steps, seed, batch), ids(4, 9), 1),
    )
    runs, figures, picture = (tmp_path / name for name in ("runs.jsonl", "a.json", "a.png"))
    command = ["--runs", str(runs), "--methods", "lora,pissa", "--rates", "1e-3,4e-3,1.6e-2"]
    command += ["--steps", "20", "--seeds", "2", "--rank", "4", "--threads", "1"]
    assert convergence.main([*command, "--stop-after", "0"]) == 3
    assert not runs.exists()
    assert convergence.main(command) == 0
    lines = runs.read_text().splitlines()
    seeds = [json.loads(line)["seed"] for line in lines]
    assert seeds[-4:] == [1, 1, 2, 2] and set(seeds[:-4]) == {0} and 4 <= len(seeds[:-4]) <= 6
    runs.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])  # as a crash would leave it
    assert convergence.main([*command, "--json", str(figures), "--png", str(picture)]) == 0
    assert len(runs.read_text().splitlines()) == len(lines)
    written = json.loads(figures.read_text())
    assert written["conditions"]["model"] == "tiny"
    assert 2 <= len(written["methods"]["pissa"]["tuning"]) <= 3
    assert len(written["methods"]["pissa"]["to_lora"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "PiSSA" in capsys.readouterr().out
