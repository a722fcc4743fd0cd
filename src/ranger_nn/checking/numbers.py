"""Numbers of 64 bits without a pattern, one for each row: a sum of them modulo 2**64 says which rows are in it.

A row that is left out, met twice or taken for another changes the sum; that two different sets of rows have one sum happens
once in 2**64. Numbers of the rows along several dimensions are multiplied, so that the sum over a region is a product of
sums along its sides.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.uint64]]
Bits = np.uint64
PLACE = 0x9E3779B97F4A7C15
"""An odd number without a pattern (2**64 over the golden ratio): places and names are multiples of it."""
GRAIN = 1 << 10
"""Rows for which numbers are made at a time: shorter dimensions share one table."""


def mixed(x: Numbers) -> Numbers:
    """Bits spread over all 64 (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> Bits(30))) * Bits(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> Bits(27))) * Bits(0x94D049BB133111EB)
    return x ^ (x >> Bits(31))


@lru_cache(1 << 14)
def named(*what: int) -> Bits:
    """An odd number for a few small integers."""
    x = np.zeros(1, Bits)
    for n in what:
        x = mixed(x + np.array([(n + 1) * PLACE % (1 << 64)], Bits))
    return Bits(x[0] | Bits(1))


@lru_cache(64)
def _made(dim: int, blocks: int) -> Numbers:
    rows = np.arange(blocks * GRAIN).astype(Bits)
    made = mixed((rows + Bits(7 + (dim << 40))) * Bits(PLACE)) | Bits(1)
    made.flags.writeable = False
    return made


def rows(dim: int, start: int, stop: int, period: int = 0) -> Numbers:
    """One odd number for each row of [start, stop) along dimension `dim`; row r is row r modulo `period`, if there is one."""
    if period:
        return _made(dim, -(-period // GRAIN))[np.arange(start, stop) % period]
    return _made(dim, max(1, -(-stop // GRAIN)))[start:stop]
