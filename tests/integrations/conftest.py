"""What the tests of ``accelerate`` share."""

import pytest


@pytest.fixture
def calls(monkeypatch):
    """An entry for each layer that a fused operation computed, alone or with others in one call."""
    pytest.importorskip("peft")
    from fastlora.integrations.peft import conv, embedding
    from fastlora.nn import compute, group

    counted = []

    def counting(module, name, count):
        original = getattr(module, name)

        def call(*args, **kwargs):
            counted.extend(range(count(args)))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counting(compute, "adapter_linear", lambda args: 1)
    counting(group, "adapter_group", lambda args: len(args[1]))
    counting(embedding, "adapted_embedding", lambda args: 1)
    counting(conv, "adapted_conv", lambda args: 1)
    return counted
