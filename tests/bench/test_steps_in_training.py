"""``bench.steps_in_training`` trains in processes of their own, and reports only equal losses."""

import json
import os

import pytest
from torch import nn

from bench import steps_in_training as bench
from fastlora.ops import library

pytest.importorskip("lion_pytorch")
if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

TINY = ["--case", "tiny", "--rows", "3", "--rounds", "1", "--steps", "2", "--threads", "1"]


@pytest.fixture
def here(monkeypatch):
    """Trains in this process, layers of 5."""

    class Here:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def Pool(self, *_, **__):
            return self

        def apply(self, call, given):
            return call(*given)

    monkeypatch.setattr(bench, "CASES", {"tiny": (2, 5, lambda n: nn.Linear(n, n, bias=False))})
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Here())


def test_every_optimizer_is_timed(here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "LR", 1e-2)
    file = tmp_path / "figures"
    assert bench.main([*TINY, "--steps", "9", "--json", str(file)]) == 0
    taken = json.loads(file.read_text())["cases"]["tiny"]["3"]
    assert tuple(taken) == bench.OPTIMIZERS
    assert all(len(own) == 1 and own[0]["milliseconds"] > 0 for own in taken.values())
    assert taken["fastlora"][0]["loss"] != taken["AdamW fused"][0]["loss"]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 4 and rows[0].split()[-2] == "1.00"


def test_adapters_train(monkeypatch):
    monkeypatch.setitem(bench.CASES, "small", (3, 32, bench.Adapted))
    few, more = (bench.train("small", "fastlora", 8, steps, 1) for steps in (1, 9))
    assert few.milliseconds > 0 and more.loss < few.loss


def test_a_round_is_a_process_each(monkeypatch):
    monkeypatch.setattr(bench, "train", _process)
    monkeypatch.setattr(bench, "OPTIMIZERS", ("one", "other"))
    taken = bench.measure("small", 1, 1, 1, 1)
    seen = {own for rounds in taken.values() for own in rounds}
    assert len(seen) == 2 and os.getpid() not in seen


def _process(*_):
    return os.getpid()


def test_nothing_is_reported_where_losses_differ(here, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LR", 1e-2)
    train = bench.train

    def off(case, optimizer, *rest):
        trained = train(case, optimizer, *rest)
        return trained._replace(loss=trained.loss * (1.001 if optimizer == "fastlora" else 1))

    monkeypatch.setattr(bench, "train", off)
    assert bench.main(TINY) == 1
    said = capsys.readouterr()
    assert "under lion-pytorch: nothing is reported" in said.err
    assert len(said.out.splitlines()) == 2


def test_bad_counts_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main([*TINY[2:], "--rows", "0"])
    assert "1 or more" in capsys.readouterr().err
