"""``bench.gpu`` without a GPU: what it would do, and how it goes on when a stage does not."""

import json
import sys
import time

import pytest
import torch

from bench import gpu


def stage(name, code, seconds=20, **options):
    return gpu.Stage(name, "", seconds, (sys.executable, "-c", code), **options)


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Runs ``main`` over other stages, as if there were a GPU."""

    def go(*stages, arguments=()):
        monkeypatch.setattr(gpu, "stages", lambda folder: list(stages))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu.here, "conditions", lambda device: {"device": "NVIDIA test"})
        monkeypatch.setattr(gpu.here, "name", lambda device: "NVIDIA test")
        status = gpu.main(["--out", str(tmp_path), *arguments])
        return status, json.loads((tmp_path / "summary.json").read_text())["stages"], tmp_path

    return go


def test_the_limits_stay_below_ten_minutes(tmp_path):
    assert sum(stage.seconds for stage in gpu.stages(tmp_path)) <= gpu.MOST_SECONDS


def test_every_stage_runs_and_the_summary_says_what_came_of_it(planted):
    status, found, folder = planted(
        stage("good", "print('12 passed')"),
        stage("bad", "print('boom'); raise SystemExit(3)"),
        stage("late", "import time; print('slow', flush=True); time.sleep(60)", seconds=1),
        stage("absent", "", missing=lambda: "it is not installed"),
        stage("last", "import bench.gpu; print('still here')"),
    )
    assert status == 1
    assert [one["verdict"] for one in found] == [
        *("passed", "failed", "over time", "left out", "passed"),
    ]
    assert [one["last"] for one in found] == ["12 passed", "boom", "slow", "", "still here"]
    assert found[1]["reason"] == "exit status 3"
    text = (folder / "summary.md").read_text()
    assert text.startswith("# NVIDIA test") and "| absent | left out | 0 | it is not" in text
    assert (folder / "bad.log").read_text() == "boom\n"


def test_all_well_is_a_status_of_zero(planted):
    status, found, _ = planted(stage("one", ""), stage("two", ""), arguments=["--only", "two"])
    assert status == 0
    assert [one["stage"] for one in found] == ["two"]


def test_what_a_late_stage_started_ends_with_it(planted, tmp_path):
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    planted(stage("late", code, seconds=1))
    time.sleep(3)
    assert not mark.exists()


def test_a_dry_run_says_what_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    for name in ("build", "tests", "sanitizer", "tune", "weight_norm", "throughput"):
        assert f"\n{name} " in shown
    assert shown.count("left out here: there is no GPU") == 5
    assert "python -m bench.tune --device cuda" in shown


def test_without_a_gpu_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", None)
    assert gpu.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_stage_off_by_a_letter(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tume"])
    assert "there is no stage 'tume'; did you mean tune?" in capsys.readouterr().err


def test_commands_parse(tmp_path):
    """The stages' own command lines are those that the benches have."""
    from bench import tune
    from bench.throughput import __main__ as throughput

    for one in gpu.stages(tmp_path):
        if one.name == "tune":
            arguments = [part for part in one.command[3:] if part not in ("--device", "cuda")]
            assert tune.parse(arguments).results == str(tmp_path)
        assert one.command[0]
    assert throughput.DEFAULTS[True, True]
