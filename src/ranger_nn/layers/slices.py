"""Slices of slices of a sequence, for `SlicedRNN`: how long, how many, how much is filled up.

    T = 10, slices (3, 2, ...)       steps   0 1 2 | 3 4 5 | 6 7 8 | 9 . .        4 slices of 3, 2 steps of filling
                                     level 1 a   b | c   d                        2 slices of 2
                                     level 2 e   f                                the rest, whole

Filling stands at the end: a recurrent network does not look ahead, so the state at the last step that is there is the
one that the network would have without filling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranger_nn.errors import InputError, PartitionError


@dataclass(frozen=True)
class Level:
    """Slices of one level: `count` slices of `length` steps, the last `filling` steps of which are not there."""

    length: int
    count: int
    filling: int


def check_slices(slices: Sequence[int]) -> tuple[int, ...]:
    """The slice lengths as a tuple.

    Raises:
        PartitionError: no lengths, or one that is not a positive integer.
    """
    given = tuple(slices) if isinstance(slices, Sequence) else (slices,)
    if not given or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in given):
        raise PartitionError(
            f"slices are the steps of a slice on each level, positive integers such as (32, 32, 32); got {slices!r}"
        )
    return given


def levels(steps: int, slices: Sequence[int]) -> list[Level]:
    """A level for each of `slices`; the last one takes what is left as one slice, however long.

    Raises:
        InputError: an empty sequence.
    """
    if steps < 1:
        raise InputError(f"a SlicedRNN needs at least one step; the sequence has {steps}")
    found = []
    for length in slices[:-1]:
        own = min(length, steps)
        count = -(-steps // own)
        found.append(Level(own, count, count * own - steps))
        steps = count
    return [*found, Level(steps, 1, 0)]
