"""Tables of measured choices, written where the operations look for them."""

import json

import pytest

from fastlora.ops import backend, tuned
from fastlora.ops.adapter_linear import tiles
from fastlora.ops.weight_norm import tiles as weight_norm_tiles


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
