"""bench.device: what it says of the device, without a GPU."""

import re

import torch

from bench import device as here


def test_roofs_are_those_of_a_copy_and_a_product(monkeypatch):
    monkeypatch.setattr(here, "_COPIED", 1 << 22)
    monkeypatch.setitem(here._SQUARE, "cpu", 64)
    roof = here.measure_roof("cpu", torch.float32)
    assert 1e8 < roof.bytes_per_s < 1e13
    assert 1e6 < roof.flops_per_s < 1e15


def test_facts_of_this_machine():
    assert 1 << 18 <= here.cache_bytes("cpu") <= 1 << 34
    assert 1 << 20 <= here.free_bytes("cpu") <= 1 << 50
    assert re.fullmatch(r"[a-z0-9-]+-threads?", here.folder_name("cpu"))
    facts = here.conditions("cpu")
    assert facts["driver"] is None and facts["versions"]["torch"] == torch.__version__


def test_an_epyc_is_known_by_family_and_model(monkeypatch):
    def folder(family, model, vendor="AuthenticAMD"):
        facts = {"vendor_id": vendor, "cpu family": str(family), "model": str(model)}
        monkeypatch.setattr(here, "cpu_facts", lambda: facts)
        monkeypatch.setattr(here, "devices", lambda: [{"name": "AMD EPYC"}])
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        return here.folder_name("cpu")

    assert folder(25, 17) == "amd-epyc-zen4-2-threads"
    assert folder(25, 1) == "amd-epyc-zen3-2-threads"
    assert folder(26, 2) == "amd-epyc-zen5-2-threads"
    assert folder(6, 143, "GenuineIntel") == "amd-epyc-2-threads"


def test_the_datasheets_hold_what_the_cards_are_sold_with():
    cards = here.DATASHEETS
    assert cards["H200"].bytes_per_s == 4.8e12 and cards["H100 SXM"].flops_per_s == 989.4e12
    assert cards["RTX 4090"].flops_per_s == 165.2e12 and cards["A100 80GB"].flops_per_s == 312e12


def test_outside_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(here, "__file__", str(tmp_path / "device.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert here.commit() is None
