"""Names on a bench's command line: found, or refused with the ones that come near."""

from __future__ import annotations

from collections.abc import Iterable

from fastlora.cli.errors import near


class UnknownName(ValueError):
    """A name that does not exist; the message has the near misses, or all there are."""


def check(kind: str, name: str, known: Iterable[str]) -> str:
    """``name``, in the case of ``known``, if it is one of them. Raises UnknownName."""
    by_lower = {other.lower(): other for other in known}
    if name.lower() not in by_lower:
        hint = near(name, by_lower.values())
        raise UnknownName(f"there is no {kind} {name!r}; {hint}")
    return by_lower[name.lower()]


def several(kind: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in a comma-separated list, each checked."""
    names = list(known)
    return [check(kind, part.strip(), names) for part in text.split(",") if part.strip()]
