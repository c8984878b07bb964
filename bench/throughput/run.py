"""Measures one cell: checks every provider, then times those that are right in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench import device as here
from bench.measure import Call, Mark, spread, take_turns
from bench.throughput.case import Cell, Operation, Provider, Step, run
from bench.throughput.check import attempt, check

BOTH = "both"
SETS = 256  # at most, of operands
LEAST, MOST = 5, 100  # rounds
SHARE = 0.8  # of the free memory that a cell may take


@dataclass
class Row:
    """What one pass of a cell gave; plain data.

    ``ms`` are the rounds of each provider; ``errors`` its largest errors by result. ``absent``
    says why a provider has no number: it is wrong, cannot run here, or is not installed.
    """

    cell: Cell
    which: str
    floor_ms: float
    flops: float
    moved: float
    chosen: str
    rival: str
    ms: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # the absent that computed something else
    disturbed: int = 0

    def speedups(self) -> list[float]:
        """The rival's time over that of ours, round by round; empty where one has no number."""
        theirs, ours = self.ms.get(self.rival, []), self.ms.get(self.chosen, [])
        return [a / b for a, b in zip(theirs, ours, strict=False)]


def sets_of(operation: Operation, cell: Cell) -> int:
    """How many sets of operands take turns: so many that the last-level cache holds half of them."""
    enough = math.ceil(2 * here.cache_bytes(cell.device) / operation.set_bytes(cell))
    return min(max(2, enough), SETS)


def needed_bytes(operation: Operation, cell: Cell, sets: int) -> int:
    """Sets of operands with their results, and one set in float64 for the check."""
    size = operation.set_bytes(cell)
    return sets * size + 3 * size * 8 // cell.element.itemsize


def measure(
    operation: Operation,
    cell: Cell,
    roof: here.Roof,
    wanted: Any,
    seconds: float,
    rounds: int | None = None,
) -> list[Row] | str:
    """A row for each pass; or why there is none.

    ``wanted`` tells of a provider's name whether it is asked for. Rounds are as many as fit in
    ``seconds``, LEAST at least, unless ``rounds`` says how many.
    """
    sets = sets_of(operation, cell)
    needed, free = needed_bytes(operation, cell, sets), here.free_bytes(cell.device)
    if needed > SHARE * free:
        return f"it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
    known = operation.providers(cell)
    # plain PyTorch is what the others are held to, asked for or not
    checked = [p for p in known if wanted(p.name) or p.name == "plain"]
    verdicts, absent = check(operation, cell, checked)
    wrong = [name for name, verdict in verdicts.items() if verdict.wrong]
    absent |= {name: f"wrong: {verdicts[name].wrong}" for name in wrong}
    sound = [p for p in checked if wanted(p.name) and p.name not in absent]

    operands = [operation.operands(cell, seed) for seed in range(sets)]
    steps: dict[str, list[Step]] = {}
    for provider in sound:
        built = attempt(partial(_build, cell, provider, operands), provider.name, absent)
        if built is not None:
            steps[provider.name] = built
    taken = _time(steps, operands, cell.device, seconds, rounds)

    rows = []
    works = {name: operation.work(cell, name) for name in operation.passes}
    if len(works) > 1:
        works[BOTH] = None  # type: ignore[assignment]
    for which in works:
        parts = [works[which]] if works[which] else [works[name] for name in operation.passes]
        row = Row(
            cell,
            which,
            1e3 * sum(roof.seconds(*part) for part in parts),
            sum(part.flops for part in parts),
            sum(part.moved for part in parts),
            operation.chosen(cell),
            operation.rival,
            errors={name: verdict.errors for name, verdict in verdicts.items()},
            absent=absent,
            wrong=wrong,
            disturbed=taken.disturbed,
        )
        for name, laps in taken.laps.items():
            if which == BOTH:
                if len(laps[0]) == len(operation.passes):
                    row.ms[name] = [sum(each) for each in laps]
                continue
            place = operation.passes.index(which)
            if place < len(laps[0]):
                row.ms[name] = [each[place] for each in laps]
        rows.append(row)
    return rows


def _build(cell: Cell, provider: Provider, operands: list[Any]) -> list[Step]:
    """A step for each set; the first is called once, so that what is lazy has happened."""
    steps = [provider.build(cell, own) for own in operands]
    if steps[0].before is not None:
        steps[0].before()
    run(steps[0], getattr(operands[0], "dys", ()), lambda: None)
    return steps


def _time(
    steps: dict[str, list[Step]],
    operands: list[Any],
    device: str,
    seconds: float,
    rounds: int | None,
) -> Any:
    """Each call, whoever's, takes the next set of operands: none of it is in the cache."""
    turn = 0

    def before(name: str) -> None:
        nonlocal turn
        turn = (turn + 1) % len(operands)
        step = steps[name][turn]
        if step.before is not None:
            step.before()

    def caller(name: str) -> Call:
        def call(mark: Mark) -> None:
            run(steps[name][turn], getattr(operands[turn], "dys", ()), mark)

        return call

    def enough(last: float) -> int:
        return max(LEAST, min(MOST, int(seconds / max(last, 1e-6))))

    calls = {name: caller(name) for name in steps}
    return take_turns(calls, rounds or enough, device, before=before, again=3)


def as_data(row: Row) -> dict[str, Any]:
    """For a results file: four digits of every time."""
    return {
        **row.cell._asdict(),
        "pass": row.which,
        "floor_ms": _short(row.floor_ms),
        "flops": row.flops,
        "bytes": row.moved,
        "chosen": row.chosen,
        "rival": row.rival,
        "ms": {name: [_short(value) for value in values] for name, values in row.ms.items()},
        "errors": {
            name: {result: _short(value) for result, value in own.items()}
            for name, own in row.errors.items()
        },
        "absent": row.absent,
        "wrong": row.wrong,
        "disturbed": row.disturbed,
    }


def from_data(data: dict[str, Any]) -> Row:
    """The row of a results file."""
    given = {name: data[name] for name in Cell._fields}
    given |= {"n": tuple(data["n"]), "k": tuple(data["k"])}
    return Row(
        Cell(**given), data["pass"], data["floor_ms"], data["flops"], data["bytes"],
        data["chosen"], data["rival"], data["ms"], data["errors"], data["absent"],
        data["wrong"], data["disturbed"],
    )  # fmt: skip


def median(row: Row, name: str) -> float | None:
    values = row.ms.get(name)
    return spread(values).median if values else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")
