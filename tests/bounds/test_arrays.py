"""Intervals of many regions at once are those of one region after the other; and both are what is said a second time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranger_nn.bounds.arrays import needs
from ranger_nn.checking.asked import asked, returned
from ranger_nn.checking.numbers import Bits
from ranger_nn.core.reach import Border, Link, Reach


@st.composite
def links(draw: st.DrawFn) -> tuple[Link, int, int]:
    """A link, rows of its input and of its output; a border of mirrored or wrapped rows is shorter than the input."""
    num, den, first = draw(st.integers(-4, 4)), draw(st.integers(1, 3)), draw(st.integers(-5, 5))
    reach, size, out = (
        Reach(num, first, first + draw(st.integers(0, 6)), den),
        draw(st.integers(1, 14)),
        draw(st.integers(1, 14)),
    )
    border = draw(st.sampled_from(Border))
    lo, hi = reach.needs(0, out)
    folds = border in (Border.REFLECT, Border.CIRCULAR)
    return Link(0, reach, Border.FILL if folds and (lo <= -size or hi >= 2 * size) else border), size, out


@settings(deadline=None, max_examples=400)
@given(links(), st.data())
def test_arrays_are_what_link_says(drawn: tuple[Link, int, int], data: st.DataObject) -> None:
    """Any number of intervals, empty ones too."""
    link, size, out = drawn
    sides = data.draw(st.lists(st.tuples(st.integers(0, out), st.integers(0, out)), min_size=1, max_size=6))
    start, stop = np.array([a for a, _ in sides]), np.array([b for _, b in sides])
    lo, hi = needs(link, start, stop, size)
    assert list(zip(lo.tolist(), hi.tolist())) == [link.needs(a, b, size) for a, b in sides]


def rows_read(link: Link, o: int, size: int) -> list[int]:
    """Rows that one output row reads, one by one; those that the border fills are left out."""
    reach = link.reach
    places = range((o * reach.num + reach.first) // reach.den, (o * reach.num + reach.last) // reach.den + 1)
    if link.border is Border.FILL:
        return [r for r in places if 0 <= r < size]
    if link.border is Border.REPLICATE:
        return [min(max(r, 0), size - 1) for r in places]
    if link.border is Border.CIRCULAR:
        return [r % size for r in places]
    return [abs(r) if abs(r) < size else 2 * size - 2 - abs(r) for r in places]


@settings(deadline=None, max_examples=400)
@given(links(), st.data())
def test_what_is_asked_is_what_is_needed(drawn: tuple[Link, int, int], data: st.DataObject) -> None:
    """Two formulas that know nothing of each other, and all rows that are read are within."""
    link, size, out = drawn
    start = data.draw(st.integers(0, out - 1))
    side = start, data.draw(st.integers(start + 1, out))
    lo, hi = asked(link, side, size)
    want = link.needs(*side, size)
    assert (lo, hi) == want or (lo == hi and want[0] == want[1])
    assert all(lo <= r < hi for o in range(*side) for r in rows_read(link, o, size))


@settings(deadline=None, max_examples=400)
@given(links(), st.data())
def test_what_is_given_back_is_summed_row_by_row(drawn: tuple[Link, int, int], data: st.DataObject) -> None:
    """And regions add up to the whole, wherever they are cut."""
    link, size, out = drawn
    numbers = np.arange(1, out + 1).astype(Bits) ** Bits(5)
    whole = np.zeros(size, Bits)
    for o in range(out):
        for r in rows_read(link, o, size):
            whole[r] += numbers[o]
    assert returned(link, numbers, 0, (0, out), (0, size), size).tolist() == whole.tolist()
    total, cut = np.zeros(size, Bits), data.draw(st.integers(0, out))
    for a, b in ((0, cut), (cut, out)):
        if a < b:
            box = asked(link, (a, b), size)
            total[slice(*box)] += returned(link, numbers[a:b], 0, (a, b), box, size)
    assert total.tolist() == whole.tolist()


@pytest.mark.parametrize("border", Border)
def test_no_row_at_all(border: Border) -> None:
    """Nothing is asked for by nothing, or of nothing."""
    link = Link(0, Reach(2, -1, 1), border)
    assert asked(link, (3, 3), 9) == link.needs(3, 3, 9) == (0, 0)
    assert asked(link, (0, 3), 0) == link.needs(0, 3, 0) == (0, 0)
