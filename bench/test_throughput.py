"""The cells of ``bench.throughput`` for pytest-benchmark, so that a CI can keep track of them.

    pytest bench --benchmark-only [-k "adapter_linear and fastlora"] [--benchmark-compare …]

Each provider that is not right by the ladder of bench/throughput/check.py fails instead of being
timed; one that is not installed or cannot run here is skipped with its reason. The contestants do
not take turns here: for ratios use ``python -m bench.throughput``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.throughput import run
from bench.throughput.__main__ import DEFAULTS, USUAL, default_dtype
from bench.throughput.case import Cell, Operation, Provider, Request
from bench.throughput.check import check
from bench.throughput.operations import OPERATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases() -> list[Any]:
    """Every provider of every cell of the quick defaults."""
    found = {}
    for own in DEFAULTS[DEVICE != "cpu", True]:
        whole = USUAL | {"dtype": [default_dtype(DEVICE)]} | own
        request = Request(**whole, device=DEVICE)
        for operation in OPERATIONS.values():
            for cell in operation.cells(request):
                for provider in operation.providers(cell):
                    title = f"{cell.title} {provider.name}".replace(" ", "-")
                    found[title] = (operation, cell, provider)
    return [pytest.param(*case, id=title) for title, case in found.items()]


@pytest.mark.parametrize(("operation", "cell", "provider"), cases())
def test_throughput(operation: Operation, cell: Cell, provider: Provider, benchmark: Any) -> None:
    plain = [each for each in operation.providers(cell) if each.name == "plain"]
    checked = plain if provider.name == "plain" else [*plain, provider]
    verdicts, absent = check(operation, cell, checked)
    if provider.name in absent:
        pytest.skip(absent[provider.name])
    if verdicts[provider.name].wrong:
        pytest.fail(f"wrong: {verdicts[provider.name].wrong}; it is not timed")

    sets = run.sets_of(operation, cell)
    operands = [operation.operands(cell, seed) for seed in range(sets)]
    steps = [provider.build(cell, own) for own in operands]
    turn = 0

    def before() -> None:
        nonlocal turn
        turn = (turn + 1) % sets
        prepare = steps[turn].before
        if prepare is not None:
            prepare()

    def call() -> None:
        run.run(steps[turn], getattr(operands[turn], "dys", ()), lambda: None)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= {"op": cell.op, "errors": verdicts[provider.name].errors}
    benchmark.pedantic(call, setup=before, rounds=15, warmup_rounds=3)
