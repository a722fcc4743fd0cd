"""Which input indices an output interval needs, along one axis.

Four integers describe every local operator (convolution, pooling, resampling, slicing, pointwise):

    output [a, b)  needs  input [ (a*num + first) // den ,  ((b-1)*num + last) // den + 1 )

    conv k=3 s=2 p=1        num=2 first=-1 last=1 den=1                (num < 0: rows that run the other way, from b-1 to a)
                 out:   0     1     2
                       /|\\   /|\\   /|\
           in:    -1  0  1  2  3  4  5          (-1 is border, the rest that overlaps is halo)

`Link` ties one dimension of an input to one dimension of the output through a `Reach`, and says what the
indices outside of the value mean (`Border`). Enter at `Link.needs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

Interval = tuple[int, int]
"""A half-open range of indices [lo, hi) along one dimension."""

Box = tuple[Interval, ...]
"""One interval for each dimension of a value."""


class Border(Enum):
    """What an index outside of the value stands for."""

    FILL = "fill"  # a constant: zero for a convolution, -inf for max pooling; nothing is read
    REPLICATE = "replicate"  # the nearest index inside
    REFLECT = "reflect"  # the index mirrored at the edge, the edge itself not repeated
    CIRCULAR = "circular"  # the index modulo the size


@dataclass(frozen=True, slots=True)
class Reach:
    """The four integers of a local operator along one axis (`den` > 0, `first` <= `last`).

    Where `num` is not above 0 later rows ask for no later rows (a flip, indices in no order): what they read is finished before.
    """

    num: int = 1
    first: int = 0
    last: int = 0
    den: int = 1

    def __post_init__(self) -> None:
        """Refuse integers that describe no interval."""
        if self.den <= 0 or self.first > self.last:
            raise ValueError(f"a reach needs den > 0 and first <= last; got {self}")

    def needs(self, start: int, stop: int) -> Interval:
        """Input interval, not clipped to the value, for output [start, stop)."""
        low, high = (start, stop - 1) if self.num >= 0 else (stop - 1, start)
        return (low * self.num + self.first) // self.den, (high * self.num + self.last) // self.den + 1

    @property
    def advances(self) -> bool:
        """Whether later output rows ask for later rows, so that both can be slid along."""
        return self.num > 0

    @property
    def halo(self) -> int:
        """Input indices read beyond an output's own share, both sides together."""
        return max(0, (self.last - self.first + self.den - 1) // self.den - max(0, -(-abs(self.num) // self.den) - 1))


IDENTITY = Reach()


def _reflected(lo: int, hi: int, size: int) -> Interval:
    parts = [(max(lo, 0), min(hi, size))]
    if lo < 0:
        parts.append((max(0, 1 - min(hi, 0)), -lo + 1))
    if hi > size:
        parts.append((2 * size - 1 - hi, 2 * size - 1 - max(lo, size)))
    kept = [(max(a, 0), min(b, size)) for a, b in parts if min(b, size) > max(a, 0)]
    return min(a for a, _ in kept), max(b for _, b in kept)


def _wrapped(lo: int, hi: int, size: int) -> Interval:
    shift = (lo // size) * size
    lo, hi = lo - shift, hi - shift
    return (lo, hi) if hi <= size else (0, size)


@dataclass(frozen=True, slots=True)
class Link:
    """Input dimension -> output dimension `out_dim`, through `reach`, with `border` outside."""

    out_dim: int
    reach: Reach = IDENTITY
    border: Border = Border.FILL

    def needs(self, start: int, stop: int, size: int) -> Interval:
        """The part of [0, size) that output [start, stop) reads: the smallest interval that holds it.

        An output interval that reads nothing inside the value (all border) gives an empty interval.
        """
        if stop <= start or size == 0:
            return 0, 0
        lo, hi = self.reach.needs(start, stop)
        if lo >= 0 and hi <= size:
            return lo, hi
        if self.border is Border.REFLECT:
            return _reflected(lo, hi, size)
        if self.border is Border.CIRCULAR:
            return _wrapped(lo, hi, size)
        if self.border is Border.REPLICATE:
            lo = min(max(lo, 0), size - 1)
            return lo, max(min(hi, size), lo + 1)
        lo, hi = min(max(lo, 0), size), min(max(hi, 0), size)
        return (lo, hi) if hi > lo else (lo, lo)
