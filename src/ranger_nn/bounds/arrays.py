"""Bounds inference for many regions at once: the intervals of `Link.needs` as arrays, one element for each region.

A slide of a thousand steps asks a thousand times what a node reads; as arrays that is a few calls of NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ranger_nn.core.reach import Border, Link, Reach

Rows = np.ndarray[Any, np.dtype[np.int64]]


def reached(reach: Reach, start: Rows, stop: Rows) -> tuple[Rows, Rows]:
    """First row, and the row after the last, not clipped to the value: rows before 0 and beyond its size go on evenly."""
    low, high = (start, stop - 1) if reach.num >= 0 else (stop - 1, start)
    return (low * reach.num + reach.first) // reach.den, (high * reach.num + reach.last) // reach.den + 1


def needs(link: Link, start: Rows, stop: Rows, size: int) -> tuple[Rows, Rows]:
    """First row, and the row after the last, that each output interval [start, stop) reads; (0, 0) where it is empty."""
    lo, hi = reached(link.reach, start, stop)
    if lo.min(initial=0) < 0 or hi.max(initial=0) > size:
        first, last = _bounded[link.border](lo, hi, max(1, size))
        inside = (lo >= 0) & (hi <= size)
        lo, hi = np.where(inside, lo, first), np.where(inside, hi, last)
    some = (stop > start) & (size > 0)
    return lo * some, hi * some


def _clipped(rows: Rows, most: int) -> Rows:
    """Between 0 and `most`: as `numpy.clip`, which takes three times as long on short arrays."""
    return np.minimum(np.maximum(rows, 0), most)


def _filled(lo: Rows, hi: Rows, size: int) -> tuple[Rows, Rows]:
    first, last = _clipped(lo, size), _clipped(hi, size)
    return first, np.maximum(first, last)


def _replicated(lo: Rows, hi: Rows, size: int) -> tuple[Rows, Rows]:
    first = _clipped(lo, size - 1)
    return first, np.maximum(np.minimum(hi, size), first + 1)


def _wrapped(lo: Rows, hi: Rows, size: int) -> tuple[Rows, Rows]:
    first = lo % size
    last = first + hi - lo
    return np.where(last <= size, first, 0), np.minimum(last, size)


def _reflected(lo: Rows, hi: Rows, size: int) -> tuple[Rows, Rows]:
    parts = [
        (np.maximum(lo, 0), np.minimum(hi, size), lo == lo),
        (np.maximum(0, 1 - np.minimum(hi, 0)), 1 - lo, lo < 0),
        (2 * size - 1 - hi, 2 * size - 1 - np.maximum(lo, size), hi > size),
    ]
    first, last = np.full_like(lo, size), np.zeros_like(hi)
    for a, b, there in parts:
        a, b = np.maximum(a, 0), np.minimum(b, size)
        there = there & (b > a)
        first, last = np.where(there, np.minimum(first, a), first), np.where(there, np.maximum(last, b), last)
    return first, last


_bounded = {
    Border.FILL: _filled,
    Border.REPLICATE: _replicated,
    Border.CIRCULAR: _wrapped,
    Border.REFLECT: _reflected,
}
