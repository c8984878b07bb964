"""``bench.small_solvers`` times both ways, and nothing where one of them is wrong."""

import json

import pytest

from bench import small_solvers
from fastlora.ops import library
from fastlora.ops.small_solvers import eager

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

SMALL = ["--sizes", "3,4", "--batches", "2", "--rounds", "2", "--threads", "1"]


@pytest.mark.parametrize("op", ["symmetric_eigen", "small_svd"])
def test_both_ways_are_timed(op, tmp_path, capsys):
    assert small_solvers.main([*SMALL, "--op", op, "--json", str(tmp_path / "figures")]) == 0
    figures = json.loads((tmp_path / "figures").read_text())["figures"]
    assert [row["n"] for row in figures] == [3, 4]
    assert all(len(row["µs"][way]) == 2 for row in figures for way in small_solvers.WAYS)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_nothing_is_reported_where_a_way_is_wrong(monkeypatch, capsys):
    solve = eager.symmetric_eigen

    def off_by_a_hair(a):
        w, v = solve(a)
        return w * (1 + 1e-13), v

    monkeypatch.setattr(eager, "symmetric_eigen", off_by_a_hair)
    assert small_solvers.main(SMALL) == 1
    assert "eager is wrong at n=3" in capsys.readouterr().err
