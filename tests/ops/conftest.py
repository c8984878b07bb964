"""Tables of measured choices, and a choice that is made by measured sizes, as a test wants them."""

import json

import pytest

from fastlora.ops import backend, library, tuned
from fastlora.ops.adapter_linear import tiles
from fastlora.ops.weight_norm import tiles as weight_norm_tiles
from tests.ops.adapter_linear.cases import InOneSum


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """``write(device, *entries)`` or ``put(device, text)``; what was remembered is forgotten."""
    monkeypatch.setattr(tuned, "TABLES", tmp_path)
    remembered = (
        *(tiles._algorithm, tiles._choose, weight_norm_tiles._choose),
        *(tuned.entries, backend._choose),
    )

    def forget():
        for one in remembered:
            one.cache_clear()

    class Tables:
        folder = tmp_path

        def write(self, device, *entries):
            self.put(device, json.dumps(tuned.table(device, {}, list(entries))))

        def put(self, device, text):
            (tmp_path / tuned.device_file(device)).write_text(text)
            forget()

    forget()
    yield Tables()
    forget()


@pytest.fixture(autouse=True)
def in_one_sum(request, monkeypatch):
    """Whatever ``native.takes_sum`` says, where the backend is ``InOneSum``."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if isinstance(parameters.get("backend"), InOneSum) and not library.missing():
        from fastlora.ops.adapter_linear import native

        monkeypatch.setattr(native, "takes_sum", lambda *sizes, **kinds: True)
