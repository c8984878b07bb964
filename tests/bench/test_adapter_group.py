"""The bench of adapter_group on small layers: it checks before it times, and says what it found."""

import json

import pytest
import torch

from bench import adapter_group as bench

SMALL = [
    "--tokens",
    "6",
    "512",
    "--rounds",
    "2",
    "--threads",
    "1",
    "--patience",
    "0",
    "--again",
    "0",
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    widths = {"qkv": (48, (40, 24, 24)), "gate_up": (48, (64, 64)), "vera": (48, (40, 24, 24))}
    monkeypatch.setattr(bench, "CASES", widths)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", ["qkv", "gate_up", "vera"])
def test_figures_of_every_contestant(case, tmp_path, capsys):
    file = tmp_path / "figures.json"
    bench.main([*SMALL, "--case", case, "--json", str(file)])  # the goal is for large layers
    figures = json.loads(file.read_text())
    assert {row["M"] for row in figures["rows"]} == {6, 512}
    assert {row["backend"] for row in figures["rows"]} >= {"eager"}
    for row in figures["rows"]:
        assert row["error"] <= bench.TOLERANCE
        assert set(row["ms"]) == set(bench.CONTESTANTS)
        assert all(len(values) == 2 for values in row["ms"].values())
    assert "torch" in figures["conditions"] and "beyond base" in capsys.readouterr().out


def test_the_goal_decides_the_exit_status(monkeypatch, capsys):
    only = [*SMALL[:1], "512", *SMALL[3:], "--case", "qkv", "--backend", "eager"]
    for share, status in ((0.5, 0), (0.7, 1)):
        taken = {"base": [10.0] * 2, "base, in place": [9.0] * 2, "plain": [20.0] * 2}
        taken |= {"separate": [17.0] * 2, "group": [10 + 10 * share] * 2}
        monkeypatch.setattr(bench, "measure", lambda *_, taken=taken: (taken, 0))
        assert bench.main(only) == status
    said = capsys.readouterr().out
    assert "qkv M=512 eager: 0.70 of plain adapters, not 0.6" in said
    assert "group / plain, beyond base: 0.70; / separate: 1.00" in said


def test_wrong_values_are_not_timed(monkeypatch, capsys):
    own = bench.adapter_group

    def off(*args, **options):
        return tuple(y * (1 + 1e-4) for y in own(*args, **options))

    monkeypatch.setattr(bench, "adapter_group", off)
    assert bench.main(SMALL) == 1
    captured = capsys.readouterr()
    assert "nothing is timed" in captured.err and "beyond" not in captured.out


@pytest.mark.parametrize("backend", bench.ours("cpu", torch.float32))
def test_the_bases_compute_the_same(backend):
    step = bench.operands("qkv", 6, 4, "cpu", torch.float32)
    calls = bench.ways(step, backend)
    calls["base"]()
    expected = step.x.grad.clone()
    calls["base, in place"]()
    torch.testing.assert_close(step.x.grad, expected)


@pytest.mark.parametrize("backend", [b for b in bench.ours("cpu", torch.float32) if b != "triton"])
def test_the_parts_are_the_steps_narrow_products(backend):
    """Together they do what they do apart, and the bound is of the medians."""
    step = bench.operands("qkv", 6, 4, "cpu", torch.float32)
    calls = bench.parts(step, backend)
    assert list(calls) == ["own", "apart", "together", "product"]
    expected = torch.nn.functional.linear(step.x, step.members[0].weight)
    torch.testing.assert_close(calls["product"](), expected.detach())
    for call in calls.values():
        call()
    assert step.x.grad is None
    taken = {"own": [4.0], "apart": [4.0], "together": [3.0], "product": [40.0]}
    ratio, least = bench.bound(step, taken)
    assert ratio == 7 / 8 and least == (4 + 3 * 40 * 12 / 40) / 8
