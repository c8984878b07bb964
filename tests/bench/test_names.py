"""Names are found, or refused with what comes near."""

import pytest

from bench import cards, names


def test_near_misses_are_offered():
    known = ("adapter_linear", "adapter_group", "weight_norm")
    assert names.check("operation", "weight_norm", known) == "weight_norm"
    assert names.check("operation", "Weight_Norm", known) == "weight_norm"
    with pytest.raises(names.UnknownName, match=r"no operation 'adapter_linaer'; did you mean ad"):
        names.check("operation", "adapter_linaer", known)
    with pytest.raises(names.UnknownName, match="there is adapter_linear and adapter_group"):
        names.check("operation", "zzz", known)
    assert names.several("operation", "weight_norm, adapter_group", known) == [
        "weight_norm",
        "adapter_group",
    ]


def test_a_card_by_either_name():
    assert cards.find("h200") is cards.find("NVIDIA H200") is cards.CARDS["h200"]
    assert cards.find("h200").arch.capability == 90
    with pytest.raises(names.UnknownName, match="did you mean rtx-4090"):
        cards.find("4090")
