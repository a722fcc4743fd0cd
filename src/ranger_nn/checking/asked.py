"""What a region of an output asks for, read from a link alone: the rows of an input, and what comes back to each of them.

Written a second time on purpose: bounds inference works on the same four integers, and what it says is held to this.

    output row o reads rows  (o*num + first)//den  to  (o*num + last)//den  of the input, both included
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ranger_nn.checking.numbers import Bits, Numbers
from ranger_nn.core.reach import Border, Interval, Link

Places = np.ndarray[Any, np.dtype[np.int64]]


def asked(link: Link, out: Interval, size: int, round_: bool = False) -> Interval:
    """Rows of an input of `size` that the output rows `out` read. `round_`: they are numbered on beyond both ends."""
    if out[1] <= out[0] or size == 0:
        return 0, 0
    reach = link.reach
    ends = [row * reach.num for row in (out[0], out[1] - 1)]
    first, last = (min(ends) + reach.first) // reach.den, (max(ends) + reach.last) // reach.den
    if round_ or (first >= 0 and last < size):
        return first, last + 1
    if link.border is Border.REPLICATE:
        return min(max(first, 0), size - 1), min(max(last, 0), size - 1) + 1
    if link.border is Border.CIRCULAR:
        start = first % size
        return (start, start + last - first + 1) if start + last - first < size else (0, size)
    if link.border is Border.REFLECT:
        turns = [r for r in (0, size - 1) if first <= r <= last]
        real = [_mirrored(first, size), _mirrored(last, size), *turns]
        return min(real), max(real) + 1
    first, last = max(first, 0), min(last, size - 1)
    return (first, last + 1) if last >= first else (0, 0)


def _mirrored(row: int, size: int) -> int:
    row = abs(row)
    return row if row < size else 2 * size - 2 - row


def returned(
    link: Link, numbers: Numbers, axis: int, out: Interval, box: Interval, size: int, round_: bool = False
) -> Numbers:
    """For each input row of `box`: the sum of what those output rows of `out` hold that read it, as often as they do.

    `numbers` has the output rows along `axis`, and the result the input rows.
    """
    reach = link.reach
    if reach.num == reach.den and reach.first == reach.last and reach.first % reach.den == 0:
        shift = reach.first // reach.den
        if box == (out[0] + shift, out[1] + shift):
            return numbers
    at = np.arange(*out) * reach.num
    first, last = (at + reach.first) // reach.den, (at + reach.last) // reach.den
    x = np.moveaxis(numbers, axis, 0)
    if reach.num < 0:  # the last output row reads first
        first, last, x = first[::-1], last[::-1], x[::-1]
    folds = link.border is not Border.FILL and not round_
    if folds and len(at) and (first[0] < 0 or last[-1] >= size):
        found = _folded(link.border, x, first, last, size)[slice(*box)]
    else:
        sums = np.concatenate([np.zeros((1, *x.shape[1:]), Bits), np.cumsum(x, 0, dtype=Bits)])
        here = np.arange(*box)
        found = sums[np.searchsorted(first, here, "right")] - sums[np.searchsorted(last, here, "left")]
    return np.moveaxis(found, 0, axis)


def _folded(border: Border, x: Numbers, first: Places, last: Places, size: int) -> Numbers:
    """For all rows of the input, where rows outside of it stand for rows inside."""
    steps = np.arange(int((last - first).max()) + 1)
    real = first[:, None] + steps
    inside = real <= last[:, None]
    if border is Border.REPLICATE:
        real = np.clip(real, 0, size - 1)
    elif border is Border.CIRCULAR:
        real = real % size
    else:
        real = np.abs(real)
        real = np.where(real >= size, 2 * size - 2 - real, real)
    found = np.zeros((size, *x.shape[1:]), Bits)
    readers = np.broadcast_to(np.arange(len(first))[:, None], real.shape)
    np.add.at(found, real[inside], x[readers[inside]])
    return found
