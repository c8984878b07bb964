"""``bench.memory`` on small models: what is measured, how it scales, and what it says."""

import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from bench import memory
from fastlora.cli.demo import contest


@pytest.fixture
def small(monkeypatch, tiny_llama):
    """A llama of two blocks in place of Llama-3-8B's."""

    def subject(blocks, tokens):
        base = tiny_llama(num_hidden_layers=blocks or 2).requires_grad_(False)
        batch = torch.zeros(1, tokens or 64, dtype=torch.long)
        return memory.Subject("a small llama", base, batch)

    monkeypatch.setitem(memory.MODELS, "small", subject)
    return subject


def saved(subject, method="lora"):
    figures = memory.measure(subject, method, 0.0)
    frozen = figures[contest.FROZEN]["saved"]
    return {side: one["saved"] - frozen for side, one in figures.items()}


def test_every_method_is_measured_and_ours_keeps_less(small, tmp_path, capsys):
    file = tmp_path / "memory.json"
    methods = "lora,dora,dora_recomputed,vera,adalora,lora_fa"
    arguments = ["--models", "small", "--methods", methods, "--json", str(file)]
    assert memory.main(arguments) == 0
    result = json.loads(file.read_text())
    assert result["format"] == memory.FORMAT
    rows = result["models"]["small"]["bytes"]
    assert list(rows) == methods.split(",")
    for row in rows.values():
        for one in row.values():
            assert 0 < one["saved"] <= one["peak"]
        assert row["fastlora"]["saved"] < row["peft"]["saved"]
    shown = capsys.readouterr().out
    assert shown.count("\n") == 3 + len(rows)


def test_what_is_kept_grows_with_tokens_and_blocks(small):
    """In proportion, which is what a figure a token and block rests on."""
    one = saved(small(1, 64))
    for other, times in ((small(1, 128), 2), (small(3, 64), 3)):
        found = saved(other)
        # a small part belongs to the whole model or to parameters, not to a token or block
        assert found["peft"] == pytest.approx(times * one["peft"], rel=0.1)


def test_a_method_that_fails_is_said_and_the_rest_goes_on(small, monkeypatch, capsys):
    measure = memory.measure

    def failing(subject, name, dropout):
        if name == "dora":
            raise RuntimeError("no such layer")
        return measure(subject, name, dropout)

    monkeypatch.setattr(memory, "measure", failing)
    assert memory.main(["--models", "small", "--methods", "dora,lora"]) == 1
    shown = capsys.readouterr().out
    assert "small, dora: not measured: RuntimeError: no such layer" in shown
    assert "lora    " in shown


def test_keeping_more_than_peft_fails(small, monkeypatch, capsys):
    row = {side: {"saved": 10 + i, "peak": 20} for i, side in enumerate(("frozen", "peft"))}
    row["fastlora"] = {"saved": 12, "peak": 20}
    monkeypatch.setattr(memory, "measure", lambda *args: row)
    assert memory.main(["--models", "small", "--methods", "lora"]) == 1
    assert "small, lora: ours keeps 12 bytes, peft's 11" in capsys.readouterr().out


def test_a_file_keeps_other_models_of_the_same_conditions(small, monkeypatch, tmp_path):
    monkeypatch.setitem(memory.MODELS, "other", small)
    row = {side: {"saved": 10, "peak": 20} for side in ("frozen", "peft", "fastlora")}
    monkeypatch.setattr(memory, "measure", lambda *args: row)
    file = tmp_path / "memory.json"

    def models(*options):
        assert memory.main(["--methods", "lora", "--json", str(file), *options]) == 0
        return list(json.loads(file.read_text())["models"])

    assert models("--models", "small") == ["small"]
    assert models("--models", "other") == ["small", "other"]
    assert models("--models", "small", "--dropout", "0.1") == ["small"]
    file.write_text("[")
    assert models("--models", "other") == ["other"]


def test_names_off_by_a_letter(capsys):
    for arguments, near in (
        (["--methods", "dorra"], "did you mean dora"),
        (["--models", "llama3-8"], "did you mean llama3-8b"),
    ):
        with pytest.raises(SystemExit):
            memory.main(arguments)
        assert near in capsys.readouterr().err
