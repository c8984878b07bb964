"""The table of bench.family."""

from bench.family import table


def figure(*steps):
    return {"seconds": steps[1], "spread": 0.0, "saved_mib": 100.0, "step_seconds": list(steps)}


def test_adds_is_taken_within_rounds():
    """A machine that slows down for a round slows all of it down."""
    figures = {
        "frozen": figure(9.0, 1.0, 2.0, 1.0),
        "lora peft": figure(9.0, 1.4, 2.4, 1.4),
        "lora fastlora": figure(9.0, 1.1, 2.1, 1.1),
    }
    heading, _, row = table(["lora"], figures).splitlines()
    assert heading.startswith("frozen 1.000 ± 0.000 s, 100 MiB")
    assert " 0.25" in row and row.rstrip().endswith("1.00")
