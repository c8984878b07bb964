"""bench.measure: who is timed when, and what is left out."""

import time

import pytest

from bench import measure


def test_all_take_turns_in_changing_order_and_the_warm_up_does_not_count():
    called = []
    calls = {name: lambda mark, name=name: called.append(name) for name in "abc"}
    taken = measure.take_turns(calls, 12, "cpu", warmup=3)
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(rounds) == 15
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 3
    assert {name: len(laps) for name, laps in taken.laps.items()} == dict.fromkeys("abc", 12)


def test_laps_are_what_lies_between_the_marks():
    def call(mark):
        time.sleep(0.002)
        mark()
        time.sleep(0.02)

    taken = measure.take_turns({"one": call}, 2, "cpu", warmup=0)
    for laps in taken.laps["one"]:
        assert len(laps) == 2
        assert 2 <= laps[0] < laps[1] and laps[1] >= 20
    assert taken.totals()["one"] == [sum(laps) for laps in taken.laps["one"]]


def test_rounds_may_depend_on_the_warm_up():
    asked = []

    def enough(seconds):
        asked.append(seconds)
        return 4

    taken = measure.take_turns({"one": lambda mark: time.sleep(0.01)}, enough, "cpu")
    assert len(taken.laps["one"]) == 4
    assert len(asked) == 1 and asked[0] >= 0.01


def test_what_comes_before_a_call_is_not_timed():
    seen = []

    def before(name):
        seen.append(name)
        time.sleep(0.05)

    taken = measure.take_turns({"one": lambda mark: None}, 3, "cpu", warmup=1, before=before)
    assert len(seen) == 4
    assert max(taken.totals()["one"]) < 50


def test_a_disturbed_step_is_taken_again(monkeypatch):
    outcomes = iter([([1.0], True), ([9.0], False), ([9.0], False), ([2.0], True)])
    monkeypatch.setattr(measure, "lap", lambda *_: next(outcomes))
    taken = measure.take_turns({"one": lambda mark: None}, 2, "cpu", warmup=0, again=2)
    assert taken.totals()["one"] == [1.0, 2.0] and taken.disturbed == 0

    monkeypatch.setattr(measure, "lap", lambda *_: ([9.0], False))
    taken = measure.take_turns({"one": lambda mark: None}, 2, "cpu", warmup=0, again=2)
    assert taken.totals()["one"] == [9.0, 9.0] and taken.disturbed == 2


@pytest.mark.parametrize(
    ("values", "expected"), [([3.0], (3.0, 3.0, 3.0)), ([1.0, 2.0, 3.0], (1.5, 2.0, 2.5))]
)
def test_median_and_quartiles(values, expected):
    assert measure.spread(values) == expected
