"""Amounts of memory: from what a user writes to bytes, and from bytes to what a user reads.

Enter at `parse_memory`. Decimal prefixes are powers of 1000 and binary prefixes powers of 1024, as
in IEC 80000-13: "512MB" is 512 000 000 bytes, "2GiB" is 2 147 483 648. A fraction of a byte is
dropped, so that what is allowed never exceeds what was written.
"""

from __future__ import annotations

import re
from decimal import Decimal
from operator import index
from typing import SupportsIndex

from ranger_nn.errors import BudgetError, UnitError

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "t": 1000**4,
    "tb": 1000**4,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "tib": 1024**4,
}
_AMOUNT = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e\+?\d{1,2})?)\s*([a-z]*)", re.IGNORECASE)
_RULE = 'memory is a positive amount of bytes, such as 512000000, "512MB" or "2GiB"'


def parse_memory(memory: str | SupportsIndex | None) -> int | None:
    """Bytes that `memory` states, or None for None (no limit).

    Raises:
        UnitError: the unit is not a known one.
        BudgetError: not an amount, or not at least one byte.
    """
    if memory is None:
        return None
    if isinstance(memory, str):
        return _at_least_one_byte(_parse_text(memory), memory)
    if isinstance(memory, SupportsIndex) and not isinstance(memory, bool):
        return _at_least_one_byte(index(memory), memory)
    raise BudgetError(f"{_RULE}; got {memory!r} of type {type(memory).__name__}. {_hint(memory)}")


def format_bytes(count: int) -> str:
    """A short text for a number of bytes: "999 B", "1.50 kB", "512 MB", "-2.10 GB".

    Three significant digits; for people to read, not to parse back without loss.
    """
    size = abs(count)
    sign = "-" if count < 0 else ""
    if size < 1000:
        return f"{sign}{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{sign}{value:.{digits}f} {unit}"


def _parse_text(text: str) -> int:
    match = _AMOUNT.fullmatch(text.strip().replace("_", ""))
    if match is None:
        raise BudgetError(f"{_RULE}; got {text!r}. Write a number followed by a unit.")
    number, unit = match.groups()
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise UnitError(
            f"{_RULE}; got {text!r}, whose unit {unit!r} is not known. "
            "Use B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)."
        )
    return int(Decimal(number) * factor)


def _at_least_one_byte(count: int, written: object) -> int:
    if count >= 1:
        return count
    raise BudgetError(
        f"{_RULE}; got {written!r}, which is {count} bytes. Give at least one byte, or leave memory out for no limit.",
        allowed=count,
    )


def _hint(memory: object) -> str:
    if isinstance(memory, float) and memory == memory and abs(memory) != float("inf"):
        return f"Write whole bytes: {int(memory)}."
    return "Write whole bytes as an int, or an amount with its unit as text."
