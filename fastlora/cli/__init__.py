"""The commands behind ``python -m fastlora``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastlora._version import __version__
from fastlora.cli import demo, info
from fastlora.cli.errors import UserError, near

COMMANDS = {"info": info, "demo": demo}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done; 1: the command ran, and a check of its own failed; 2: the request cannot be met, said
    in one sentence on stderr; 130: interrupted. A defect of the package keeps its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parse(words)
        return arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(words: list[str]) -> argparse.Namespace:
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise UserError(f"there is no command '{words[0]}'; {near(words[0], COMMANDS)}")
    parser = _Parser(
        prog="python -m fastlora",
        description="LoRA-family methods at nearly the cost of the frozen layer.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastlora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_parser(commands, name).set_defaults(run=module.run)
    arguments = parser.parse_args(words or ["--help"])
    if not hasattr(arguments, "run"):
        parser.error(f"a command is missing; {near('', COMMANDS)}")
    return arguments
