"""Regions of an array's axes, and how an axis is divided evenly or by size.

10 elements in 4 regions       0..3 | 3..6 | 6..8 | 8..10       the larger ones first, sizes differ by at most one
own and read                   own [3, 6) and overlap 1 read [2, 7), clipped at the ends of the axis
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ranger_nn.core.reach import Box, Interval
from ranger_nn.errors import PartitionError


@dataclass(frozen=True, slots=True)
class Region:
    """One region: the elements that it owns along the axes that are cut, and those that it reads (own and halo)."""

    index: int
    own: Box
    read: Box

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements read along each cut axis."""
        return tuple(b - a for a, b in self.read)


class AxisPartition(Protocol):
    """A partition that follows from shapes alone: `Grid`, `TimeSlices`, `Blocks`. Layers need no more of it."""

    @property
    def axes(self) -> tuple[int, ...] | None:
        """Axes of the array that are cut; None: the framework's spatial axes, its time axis or its units."""
        ...

    @property
    def rank(self) -> int | None:
        """How many axes are cut; None: as many spatial axes as the array has."""
        ...

    @property
    def count(self) -> int | None:
        """Regions, where they do not depend on the array."""
        ...

    def regions(self, sizes: Sequence[int]) -> tuple[Region, ...]:
        """All regions of axes of these sizes, in row-major order."""
        ...


def even(size: int, count: int, axis: int) -> list[Interval]:
    """`count` intervals of [0, size) whose lengths differ by at most one."""
    if count > size:
        raise PartitionError(
            f"each region needs at least one element: {count} regions were asked for along axis {axis}, which has "
            f"{size} elements; ask for at most {size}"
        )
    length, longer = divmod(size, count)
    starts = [i * length + min(i, longer) for i in range(count + 1)]
    return list(itertools.pairwise(starts))


def by_length(size: int, length: int) -> list[Interval]:
    """Intervals of `length`, the last one shorter if it must be."""
    return [(a, min(a + length, size)) for a in range(0, size, length)]


def positive(name: str, values: Sequence[int]) -> None:
    """Refuse counts and lengths that are not positive integers."""
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int) or v < 1:
            raise PartitionError(f"{name} must be positive integers; got {v!r} in {tuple(values)}; for example 2 or 4")


def check_axes(axes: Sequence[int]) -> None:
    """Refuse what is no axis, and an axis that is named twice."""
    if any(isinstance(a, bool) or not isinstance(a, int) for a in axes) or len(set(axes)) < len(axes):
        raise PartitionError(f"axes are different integers, such as (2, 3) or (-2, -1); got {tuple(axes)}")


def widened(own: Interval, overlap: int, size: int) -> Interval:
    """What a region reads: its own elements and `overlap` more on either side, inside the axis."""
    return max(0, own[0] - overlap), min(size, own[1] + overlap)
