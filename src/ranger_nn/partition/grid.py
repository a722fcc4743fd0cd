"""`Grid`: blocks along one to three spatial axes, with an overlap and a blend window if wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from ranger_nn.core.reach import Interval
from ranger_nn.core.region import Region, by_length, check_axes, even, positive, widened
from ranger_nn.errors import PartitionError
from ranger_nn.names import nearest

WINDOWS = ("cosine", "linear")


@dataclass(frozen=True, init=False)
class Grid:
    """Blocks along one to three spatial axes: `Grid(2, 2)`, or `Grid(size=(256, 256))`.

    Sizes that do not divide are met by regions that differ by one element (`Grid(2)` of 5 is 3 + 2), or with `size`
    by a shorter last one.

    Without `window` a region reads `overlap` more elements on each side and gives back only its own (a halo). With
    a window, regions give back all that they read, and where they overlap their results are blended by weights that
    sum to one everywhere: a partition of unity (Babuska & Melenk 1997; for networks Moseley et al. 2023, FBPINNs).

    Args:
        counts: regions along each axis.
        size: elements of a region along each axis, instead of `counts`.
        overlap: elements (int), or the share of a region's length (float, 0.25: a quarter) on each side.
        window: None, "cosine" or "linear".
        axes: axes of the array; None: its spatial axes (the last ones in PyTorch, those of the data format in Keras).

    Raises:
        PartitionError: arguments that contradict each other, more regions than elements (when applied).
    """

    counts: tuple[int, ...]
    size: tuple[int, ...] | None = None
    overlap: int | float = 0
    window: str | None = None
    axes: tuple[int, ...] | None = None

    def __init__(
        self,
        *counts: int,
        size: int | Sequence[int] | None = None,
        overlap: int | float = 0,
        window: str | None = None,
        axes: Sequence[int] | None = None,
    ) -> None:
        lengths = (size,) if isinstance(size, int) else None if size is None else tuple(size)
        if bool(counts) == (lengths is not None):
            raise PartitionError(f"a Grid takes counts or a size, not both: got {counts} and size={size}; Grid(2, 2)")
        given = counts or lengths or ()
        positive("counts and sizes of a Grid", given)
        if not 1 <= len(given) <= 3:
            raise PartitionError(f"a Grid cuts one to three axes; got {len(given)} in {given}")
        if axes is not None and len(axes) != len(given):
            raise PartitionError(f"axes must name one axis for each of {given}; got {tuple(axes)}")
        if axes is not None:
            check_axes(axes)
        number = isinstance(overlap, int | float) and not isinstance(overlap, bool)
        if not number or not overlap >= 0 or (isinstance(overlap, float) and overlap > 1):
            raise PartitionError(f"overlap is a number of elements, or a share from 0.0 to 1.0; got {overlap!r}")
        if window is not None and window not in WINDOWS:
            raise PartitionError(f"window must be None or one of {WINDOWS}; got {window!r}{nearest(window, WINDOWS)}")
        if window is not None and not overlap:
            raise PartitionError(f"window={window!r} blends where regions overlap; give an overlap above 0")
        for name, value in {
            "counts": tuple(counts),
            "size": lengths,
            "overlap": overlap,
            "window": window,
            "axes": None if axes is None else tuple(axes),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def rank(self) -> int:
        """Axes that are cut."""
        return len(self.counts or self.size or ())

    @property
    def count(self) -> int | None:
        """Regions; None with `size`, where they depend on the array."""
        return math.prod(self.counts) if self.counts else None

    def intervals(self, size: int, axis: int) -> list[tuple[Interval, Interval]]:
        """(own, read) of each region along one axis of `size` elements."""
        owns = by_length(size, self.size[axis]) if self.size else even(size, self.counts[axis], axis)
        overlap = self._overlap(owns[0])
        return [(own, widened(own, overlap, size)) for own in owns]

    def _overlap(self, own: Interval) -> int:
        """In elements; a share is one of the first region's length."""
        return round(self.overlap * (own[1] - own[0])) if isinstance(self.overlap, float) else self.overlap

    def regions(self, sizes: Sequence[int]) -> tuple[Region, ...]:
        """All regions of axes of these sizes, in row-major order."""
        along = [self.intervals(size, axis) for axis, size in enumerate(sizes)]
        return tuple(
            Region(i, tuple(own for own, _ in cell), tuple(read for _, read in cell))
            for i, cell in enumerate(product(*along))
        )

    def blend(self, size: int, axis: int) -> list[list[float]] | None:
        """Weights of each region's elements along one axis, which sum to one at every element; None: no window."""
        if self.window is None:
            return None
        cells = self.intervals(size, axis)
        overlap = self._overlap(cells[0][0])
        raw = [[_bell(self.window, p, own, overlap, size) for p in range(*read)] for own, read in cells]
        total = [0.0] * size
        for (_, read), weights in zip(cells, raw):
            for p, w in zip(range(*read), weights):
                total[p] += w
        return [[w / total[p] for p, w in zip(range(*read), weights)] for (_, read), weights in zip(cells, raw)]

    def coordinates(self, size: int, axis: int) -> list[list[float]]:
        """Position of each element read, -1 to 1 from end to end of its region (in real numbers, not elements)."""
        cells = self.intervals(size, axis)
        spans = (
            [own for own, _ in cells]
            if self.size
            else [(i * size / len(cells), (i + 1) * size / len(cells)) for i in range(len(cells))]
        )
        return [
            [(p + 0.5 - (a + b) / 2) / max((b - a) / 2, 0.5) for p in range(*read)]
            for (a, b), (_, read) in zip(spans, cells)
        ]


def _bell(window: str, p: int, own: Interval, overlap: int, size: int) -> float:
    """Weight, not yet normalised: 1 deep inside, falling to 0 at the end of the overlap; flat at the ends of the axis."""
    left = 1.0 if own[0] == 0 or not overlap else (p + 0.5 - own[0] + overlap) / (2 * overlap)
    right = 1.0 if own[1] == size or not overlap else (own[1] + overlap - p - 0.5) / (2 * overlap)
    t = min(left, right, 1.0)
    return t if window == "linear" else 0.5 - 0.5 * math.cos(math.pi * t)
