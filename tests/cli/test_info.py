"""``info``: what it says is true, and ``--check`` can fail."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch

import fastlora
from fastlora.cli import main
from fastlora.cli.info import check
from fastlora.ops import library
from fastlora.ops.adapter_linear import eager


def test_json_holds_versions_devices_and_backends(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["fastlora"] == fastlora.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["devices"][0]["threads"] == torch.get_num_threads()
    rows = [row for row in facts["backends"] if row["device"] == "cpu"]
    assert {row["operation"] for row in rows} == set(fastlora.ops.OPERATIONS)
    for op in fastlora.ops.OPERATIONS:
        assert sum(row["taken"] for row in rows if row["operation"] == op) == 1
    assert all(row["detail"] for row in rows)


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    found = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line.split() for line in lines if "peft" in line) == ["peft", "not", "installed"]


def test_the_native_core_is_there_or_the_reason_why_not(monkeypatch, capsys):
    assert main(["info"]) == 0
    found = capsys.readouterr().out
    if not library.missing():
        assert f"there, for {', '.join(library.core().isas())}" in found
    monkeypatch.setattr(library, "cuda_missing", lambda: "no nvcc was there")
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["native"]["cuda"] == "no nvcc was there"


def test_check_runs_every_backend_that_can(capsys):
    assert main(["info", "--check", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    checked = {(row["backend"], row["dtype"]) for row in facts["check"] if row["device"] == "cpu"}
    runnable = {row["backend"] for row in facts["backends"] if row["can_run"]}
    assert ("eager", "float32") in checked and ("eager", "bfloat16") in checked
    assert runnable <= {row["backend"] for row in facts["check"]}
    assert all(row["max_relative_error"] > 0 for row in facts["check"])


def test_check_finds_a_wrong_gradient(monkeypatch, capsys):
    backward = eager.backward

    def off_by_a_hair(*arguments, **options):
        dx, dweight, dA, dB, dbias = backward(*arguments, **options)
        return dx, dweight, dA * 1.001, dB, dbias

    monkeypatch.setattr(eager, "backward", off_by_a_hair)
    assert main(["info", "--check"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert any("float32" in line and "eager" in line and "dlora_A" in line for line in failed)


@pytest.mark.parametrize("op", ["svd_lowrank", "symmetric_eigen", "small_svd"])
def test_check_finds_a_wrong_decomposition(op, monkeypatch, capsys):
    right = getattr(check, op)

    def off_by_a_hair(*arguments, **options):
        found = right(*arguments, **options)
        if op == "svd_lowrank":
            return found._replace(S=found.S * 1.0001)
        values = 0 if op == "symmetric_eigen" else 1
        return tuple(part * 1.0001 if i == values else part for i, part in enumerate(found))

    monkeypatch.setattr(check, op, off_by_a_hair)
    assert main(["info", "--check", "--json"]) == 1
    failed = [row for row in json.loads(capsys.readouterr().out)["check"] if not row["ok"]]
    assert {row["operation"] for row in failed} == {op}
    assert {"eager"} <= {row["backend"] for row in failed}


def test_check_reports_a_backend_that_breaks(monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(eager, "forward", broken)
    assert main(["info", "--check"]) == 1
    assert "RuntimeError: no such instruction" in capsys.readouterr().out
