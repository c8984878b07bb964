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
    assert list(case["µs"]) == ["first step", "next ones", "settled"]
    for taken in case["µs"].values():
        assert len(taken) == 8
        assert all(len(own) == 2 and min(own) > 0 for own in taken.values())


def test_a_turn_is_marked_by_kind():
    """Which steps lie between which marks."""
    seen = []
    sign_momentum._turn(lambda: seen.append("step"))(lambda: seen.append("mark"))
    assert "".join(one[0] for one in seen) == "sm" + 4 * "s" + "m" + 6 * "s" + "m" + 6 * "s" + "m"
    laps = {"way": [[1.0, 8.0, 100.0, 18.0]]}
    found = [sign_momentum._of(kind, laps)["way"] for kind in sign_momentum.KINDS]
    assert found == [[1000.0], [2000.0], [3000.0]]


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
    case = json.loads(file.read_text())["cases"]["large"]
    assert len(case["µs"]["first step"]) == 8 + there
    assert ("compiled is absent: no compiler\n" in capsys.readouterr().err) != there
