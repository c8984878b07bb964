"""Names on a bench's command line: found, or refused with the ones that come near."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownName(ValueError):
    """A name that does not exist; the message has the near misses, or all there are."""


def check(kind: str, name: str, known: Iterable[str]) -> str:
    """``name`` if it is one of ``known``. Raises UnknownName."""
    names = list(known)
    if name in names:
        return name
    lower = {other.lower(): other for other in names}
    if name.lower() in lower:
        return lower[name.lower()]
    near = [lower[one] for one in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    near += [other for other in names if name.lower() in other.lower() and other not in near]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else f"there is {', '.join(names)}"
    raise UnknownName(f"there is no {kind} {name!r}; {hint}")


def several(kind: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in a comma-separated list, each checked."""
    names = list(known)
    return [check(kind, part.strip(), names) for part in text.split(",") if part.strip()]
