"""Unknown names: the near match, for error texts."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    found = get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
