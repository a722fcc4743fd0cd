"""`TimeSlices`: the steps of a sequence in consecutive slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranger_nn.core.region import Region, by_length, check_axes, even, positive, widened
from ranger_nn.errors import PartitionError


@dataclass(frozen=True)
class TimeSlices:
    """Consecutive slices of a sequence: `TimeSlices(8)` gives eight, `TimeSlices(length=128)` as many as it takes.

    Args:
        number: slices; lengths differ by at most one step.
        length: steps of a slice, instead of `number`; the last one may be shorter.
        overlap: steps that a slice also reads before and after its own.
        axis: time axis of the array; None: axis 1, as in (batch, time, features).

    Raises:
        PartitionError: neither or both of `number` and `length`, values below 1, more slices than steps.
    """

    number: int | None = None
    length: int | None = None
    overlap: int = 0
    axis: int | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if (self.number is None) == (self.length is None):
            raise PartitionError(
                f"TimeSlices takes a number or a length: got number={self.number} and length={self.length}; "
                "for example TimeSlices(8) or TimeSlices(length=128)"
            )
        positive("number and length of TimeSlices", [v for v in (self.number, self.length) if v is not None])
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int) or self.overlap < 0:
            raise PartitionError(f"overlap of TimeSlices is a number of steps, 0 or more; got {self.overlap!r}")

        check_axes([] if self.axis is None else [self.axis])

    @property
    def axes(self) -> tuple[int, ...]:
        """The time axis."""
        return (1 if self.axis is None else self.axis,)

    @property
    def rank(self) -> int:
        """One axis."""
        return 1

    @property
    def count(self) -> int | None:
        """Slices; None with `length`."""
        return self.number

    def regions(self, sizes: Sequence[int]) -> tuple[Region, ...]:
        """Slices of `sizes[0]` steps, in order."""
        (size,) = sizes
        owns = even(size, self.number, self.axes[0]) if self.number else by_length(size, self.length or size)
        return tuple(Region(i, (own,), (widened(own, self.overlap, size),)) for i, own in enumerate(owns))
