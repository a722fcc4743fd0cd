"""`Blocks`: the units of a layer in groups, and a weight matrix in the blocks that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranger_nn.core.reach import Interval
from ranger_nn.core.region import Region, even, positive


@dataclass(frozen=True)
class Blocks:
    """Groups of units. For a weight matrix: `Blocks(2, 3)` cuts its inputs in two and its outputs in three.

        y_j = sum over i of  x_i W_ij          column blocks are stitched, row blocks are summed: exact

    A 5 x 5 matrix in `Blocks(2, 2)` has blocks of 3 + 2 by 3 + 2. As a partition of an array it cuts the last axis
    into `rows` regions.

    Args:
        rows: groups of input units.
        columns: groups of output units.
        axis: axis of an array that is cut; None: the last.

    Raises:
        PartitionError: counts below 1, more groups than units.
    """

    rows: int = 1
    columns: int = 1
    axis: int | None = None

    def __post_init__(self) -> None:
        """Refuse counts that are not positive."""
        positive("rows and columns of Blocks", (self.rows, self.columns))

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of the units."""
        return (-1 if self.axis is None else self.axis,)

    @property
    def rank(self) -> int:
        """One axis."""
        return 1

    @property
    def count(self) -> int:
        """Groups of input units."""
        return self.rows

    def regions(self, sizes: Sequence[int]) -> tuple[Region, ...]:
        """Groups of `sizes[0]` input units."""
        return tuple(Region(i, (own,), (own,)) for i, own in enumerate(even(sizes[0], self.rows, self.axes[0])))

    def matrix(self, inputs: int, outputs: int) -> tuple[list[Interval], list[Interval]]:
        """(input intervals, output intervals) of a weight matrix."""
        return even(inputs, self.rows, 0), even(outputs, self.columns, 1)
