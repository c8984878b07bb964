"""``bench.tune``: what it asks, how it decides, and a table that the operations read."""

import contextlib
import json

import pytest
import torch

from bench import cards, tune
from fastlora.ops import backend, tuned
from fastlora.ops.adapter_linear import tiles

H200 = cards.CARDS["h200"].arch
SMALL = ["--device", "cpu", "--shapes", "smollm2-135m", "--m", "8", "--rank", "4"]


@pytest.fixture
def small(monkeypatch):
    """The smallest layer, so that a round takes no time."""
    model = tune.MODELS["smollm2-135m"]._replace(hidden=32, kv=16, intermediate=48, heads=32)
    monkeypatch.setitem(tune.MODELS, "smollm2-135m", model)


def times(**medians):
    return {name: [value, value * 1.001, value * 0.999] * 4 for name, value in medians.items()}


@pytest.mark.parametrize(
    "ms, expected",
    [
        (times(eager=1.0, native=0.5, onednn=0.7), "native"),
        (times(eager=1.0, native=0.99), "eager"),  # by less than 2 %
        ({"eager": [1.0] * 10, "native": [0.5] * 8 + [1.1] * 2}, "eager"),  # not in nine of ten
        (times(native=0.5, onednn=0.4), "onednn"),  # the present choice cannot run
    ],
)
def test_only_a_clear_winner_is_taken(ms, expected):
    assert tune.decide(ms, "eager") == expected


def test_a_processor_is_measured_and_its_table_read(small, monkeypatch, tmp_path, capsys):
    """The whole command, but with clocks that say eager is the fastest."""

    def clocks(calls, rounds, device, **options):
        for call in calls.values():
            call()
        return {name: [1.0 if name == "eager" else 2.0] * rounds for name in calls}

    monkeypatch.setattr(tune, "whole", clocks)
    name = backend.device_name(torch.device("cpu"))
    file = tmp_path / tuned.device_file(name)
    arguments = [*SMALL, "--out", str(file), "--results", str(tmp_path / "results")]
    assert tune.main(arguments) == 0
    entries = tuned.read(file, name)
    assert {(one.operation, one.what, one.dtype, one.take) for one in entries} == {
        ("adapter_linear", "backend", "float32", "eager"),
        ("weight_norm", "backend", "float32", "eager"),
    }
    monkeypatch.setattr(tuned, "TABLES", tmp_path)
    tuned.entries.cache_clear()
    assert tuned.choice(name, "adapter_linear", "backend", "float32") == "eager"
    tuned.entries.cache_clear()
    result = json.loads((tmp_path / "results" / "tune.json").read_text())
    assert result["format"] == tune.FORMAT and len(result["answers"]) == 2
    assert "2 choices measured, 2 of another candidate" in capsys.readouterr().out


def test_a_present_choice_that_wins_writes_no_table(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        tune, "whole", lambda calls, rounds, device: {name: [1.0] * rounds for name in calls}
    )
    file = tmp_path / "table.json"
    assert tune.main([*SMALL, "--out", str(file), "--results", str(tmp_path)]) == 0
    assert not file.exists()
    assert "no table is written" in capsys.readouterr().out


def test_a_candidate_with_other_results_is_not_timed(small, monkeypatch, tmp_path, capsys):
    from fastlora.ops.adapter_linear import eager

    forward = eager.forward

    def off(*args, **options):
        y, t = forward(*args, **options)
        return y * 1.01, t

    monkeypatch.setattr(eager, "forward", off)
    arguments = [*SMALL, "--rounds", "2", "--results", str(tmp_path), "--out", str(tmp_path / "t")]
    assert tune.main(arguments) == 1
    assert "eager: other results" in capsys.readouterr().out


def test_no_time_and_no_memory_are_said(small, monkeypatch, tmp_path, capsys):
    arguments = [*SMALL, "--results", str(tmp_path), "--out", str(tmp_path / "t")]
    assert tune.main([*arguments, "--seconds", "0"]) == 0
    assert capsys.readouterr().out.count("left out, 0 s are over") == 2
    monkeypatch.setattr(tune.here, "free_bytes", lambda device: 1)
    assert tune.main(arguments) == 0
    assert capsys.readouterr().out.count("left out, it needs") == 2


def test_a_dry_run_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(tune, "ask", None)
    assert tune.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "adapter_linear backend" in shown and "nothing was measured" in shown


def test_a_card_that_is_not_here_is_predicted(capsys):
    assert tune.main(["--predict", "h200", "--m", "128", "--rank", "16"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("H200: ")
    assert "adapter_linear forward, M=128 N=4096 K=4096 r=16 bfloat16" in shown
    assert shown.count("at least") >= 4 and "µs" in shown


def test_every_choice_has_its_candidates():
    args = tune.parse(["--predict", "h200"])
    asked = list(tune.questions(args, H200))
    assert {one.what for one in asked} == set(tune.WHATS) - {"backend"}
    for one in asked:
        assert one.present in one.candidates and len(set(one.candidates)) == len(one.candidates)
    assert len({(one.what, one.sizes, one.dtype) for one in asked}) == len(asked)


@pytest.mark.parametrize("what", [what for what in tune.WHATS if what != "backend"])
def test_every_choice_can_be_run_and_put_in_its_place(what):
    """In the interpreter: each candidate gives what the present choice does."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    from fastlora.ops.adapter_linear import triton as kernels

    arch = kernels.arch_of(torch.device(device))
    question = tune._question(what, torch.float16, 32, 64, 48, 16, arch)
    answer = tune.ask(question, device, rounds=1)
    assert not answer.wrong
    assert set(answer.ms) <= {tune.label(take) for take in question.candidates}


def test_a_choice_is_put_in_its_place_only_inside():
    question = tune._question("tile main", torch.float16, 512, 4096, 4096, 16, H200)
    other = next(take for take in question.candidates if take != question.present)
    call = (torch.float16, 512, 4096, 4096, 16, H200)
    with tune.taking(question, other):
        assert tiles.choose("main", *call) == other
        assert tiles.choose("shrink", *call) != other
    assert tiles.choose("main", *call) == question.present
    asked = tune._question("dx", torch.float16, 512, 4096, 4096, 16, H200)
    with contextlib.suppress(ZeroDivisionError), tune.taking(asked, "accumulate"):
        assert tiles.algorithm("dx", *call) == "accumulate"
        assert tiles.algorithm("forward", *call) == tiles.algorithm("forward", *call)
        raise ZeroDivisionError
    assert tiles.algorithm("dx", *call) == asked.present


def test_names_off_by_a_letter(capsys):
    for arguments, near in (
        (["--predict", "h20"], "did you mean h200"),
        (["--shapes", "lama3-8b"], "did you mean llama3-8b"),
        (["--what", "tile mian"], "did you mean tile main"),
        (["--dtype", "bfloat6"], "did you mean bfloat16"),
    ):
        with pytest.raises(SystemExit):
            tune.parse(arguments)
        assert near in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tune.parse(["--device", "cuda"])
        assert "there is no CUDA device here" in capsys.readouterr().err
