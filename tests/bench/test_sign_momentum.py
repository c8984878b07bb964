"""``bench.sign_momentum`` times every way, and nothing where one of them is wrong."""

import json

import pytest
import torch

from bench import sign_momentum
from fastlora.ops import library
from fastlora.ops.sign_momentum import eager

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

SMALL = ["--case", "tiny", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(sign_momentum, "CASES", {"tiny": [(4, 5), (3, 2)]})


def test_every_way_is_timed(tmp_path):
    assert sign_momentum.main([*SMALL, "--json", str(tmp_path / "figures")]) == 0
    case = json.loads((tmp_path / "figures").read_text())["cases"]["tiny"]
    assert len(case["µs of the first step"]) == 7
    assert all(len(own) == 2 for own in case["µs of the next ones"].values())


def test_nothing_is_reported_where_a_way_is_wrong(monkeypatch, capsys):
    whole = eager.update

    def off(job, table=None):
        whole(job)
        job.params[0].data[0, 0] += 1

    monkeypatch.setattr(eager, "update", off)
    assert sign_momentum.main(SMALL) == 1
    assert "eager is not the reference" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_what_is_compiled_is_timed_where_there_is_a_compiler(monkeypatch, capsys, tmp_path, there):
    def compile_(rule):
        if not there:
            raise RuntimeError("no compiler\nand more")
        return rule

    monkeypatch.setattr(sign_momentum, "CASES", {"large": [(4, 5), (3, 2)]})
    monkeypatch.setattr(torch, "compile", compile_)
    file = tmp_path / "figures"
    assert sign_momentum.main([*SMALL[2:], "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["cases"]["large"]["µs of the first step"]) == 7 + there
    assert ("compiled is absent: no compiler\n" in capsys.readouterr().err) != there
