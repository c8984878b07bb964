"""Mistakes a user can put right: one sentence, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The request cannot be met as asked; the message is one sentence that names the thing."""


def near(word: str, known: Iterable[str]) -> str:
    """'did you mean …?' where something known resembles ``word``, else what is known."""
    names = list(known)
    matches = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    return f"there is {' and '.join(names)}" if len(names) > 1 else f"there is only {names[0]}"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
