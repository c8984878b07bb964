"""``info``: versions, devices, and which backends can run here."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any, name: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help="versions, devices, and which backends can run and why the others cannot",
        description="What is installed, what it runs on, and which backends can run.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run one small step, forward and backward, on every backend that can run here, and "
        "compare it with the formula in float64; exit code 1 if one differs",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    facts = collect(check=arguments.check)
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0 if all(row["ok"] for row in facts.get("check", [])) else 1


def collect(check: bool = False) -> dict[str, Any]:
    """Everything ``info`` says, as plain data."""
    from fastlora.cli import facts
    from fastlora.ops.explain import OPERATIONS

    rows = [
        {
            "operation": op,
            "device": str(at.device),
            "dtype": str(at.dtype).removeprefix("torch."),
            "backend": name,
            "can_run": not sentence.startswith("cannot"),
            "taken": taken,
            "detail": sentence,
        }
        for op, operation in OPERATIONS.items()
        for at in facts.situations()
        for name, taken, sentence in operation.table(op, at)
    ]
    collected = {
        "versions": facts.versions(),
        "devices": facts.devices(),
        "native": facts.native(),
        "backends": rows,
    }
    if check:
        from fastlora.cli.info.check import check_everything

        collected["check"] = check_everything()
    return collected


def render(collected: dict[str, Any]) -> str:
    from fastlora.cli.facts import describe

    lines = ["versions"]
    for package, version in collected["versions"].items():
        lines.append(f"  {package:<14}{version or 'not installed'}")
    lines += ["", "devices"]
    for row in collected["devices"]:
        lines.append(f"  {row['device']:<14}{describe(row)}")
    lines += ["", "native core"]
    for part, sentence in collected["native"].items():
        lines.append(f"  {part:<14}{sentence}")
    heading = None
    for row in collected["backends"]:
        if heading != (heading := f"{row['operation']} for {row['dtype']} on {row['device']}"):
            lines += ["", heading]
        arrow = "->" if row["taken"] else "  "
        lines.append(f"{arrow}  {row['backend']:<12}{row['detail']}")
    if "check" in collected:
        lines += ["", "check: one step, forward and backward, against the formula in float64"]
        for row in collected["check"]:
            lines.append(
                f"  {row['operation']:<16}{row['device']:<8}{row['dtype']:<10}{row['backend']:<8}"
                f"{'ok' if row['ok'] else 'FAILED':<8}{row['detail']}"
            )
    return "\n".join(lines)
