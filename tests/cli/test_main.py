"""The door: commands, near misses, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastlora.cli import info, main


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inof"], "did you mean info?"),
        (["demmo"], "did you mean demo?"),
        (["train-a-whale"], "there is info and demo"),
        (["info", "--jsn"], "--jsn"),
        (["demo"], "--out"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, expected, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(info, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_as_a_module_it_returns_the_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "unknown"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_commands_bring_in_no_heavy_package():
    code = (
        "import sys, fastlora.cli; fastlora.cli.main(['info', '--json']);"
        "heavy = {'peft', 'transformers', 'triton', 'matplotlib'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
