"""The bench of weight_norm on a small case: it checks before it times, and says what it found."""

import json

import pytest
import torch

from bench import weight_norm as bench

SMALL = ["--n", "64", "--k", "48", "--rank", "4", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_figures_of_every_way(tmp_path, capsys):
    file = tmp_path / "figures.json"
    bench.main([*SMALL, "--json", str(file)])  # goals are for large weights: the status may be 1
    figures = json.loads(file.read_text())
    assert max(figures["errors"]) <= bench.TOLERANCE
    assert {"peft", "dense", "eager, cold", "nothing changed"} <= set(figures["ms"])
    assert all(len(values) == 2 for values in figures["ms"].values())
    assert "torch" in figures["conditions"] and "× peft" in capsys.readouterr().out


def test_wrong_values_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "weight_norm", _off)
    assert bench.main(SMALL) == 1
    assert "nothing is timed" in capsys.readouterr().err


def _off(*args, **options):
    from fastlora.ops.weight_norm import weight_norm

    return weight_norm(*args, **options) * (1 + 1e-4)


def test_baselines_compute_the_same():
    weight, a, b = torch.randn(20, 30), torch.randn(4, 30), torch.randn(20, 4)
    torch.testing.assert_close(bench.peft_way(weight, a, b), bench.dense_way(weight, a, b))
