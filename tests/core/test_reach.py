"""Reach and link against a list of indices written out, and against the framework by perturbation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ranger_nn.core.reach import Border, Link, Reach
from ranger_nn.ops.window import transposed_reach, window_reach

reaches = st.builds(
    lambda num, first, width, den: Reach(num, first, first + width, den),
    st.integers(-4, 4),
    st.integers(-9, 9),
    st.integers(0, 9),
    st.integers(1, 4),
)
intervals = st.tuples(st.integers(0, 20), st.integers(1, 12)).map(lambda p: (p[0], p[0] + p[1]))


def read(reach: Reach, start: int, stop: int) -> list[int]:
    """Every index that the outputs read, one output at a time."""
    return [
        i
        for o in range(start, stop)
        for i in range((o * reach.num + reach.first) // reach.den, (o * reach.num + reach.last) // reach.den + 1)
    ]


@settings(deadline=None)
@given(reaches, intervals)
def test_needs_is_the_hull_of_what_is_read(reach: Reach, interval: tuple[int, int]) -> None:
    """No more and no less."""
    found = read(reach, *interval)
    assert reach.needs(*interval) == (min(found), max(found) + 1)


@settings(deadline=None)
@given(reaches, intervals, st.integers(1, 30), st.sampled_from(list(Border)))
def test_a_link_stays_inside_and_covers(reach: Reach, interval: tuple[int, int], size: int, border: Border) -> None:
    """The interval lies in the value and holds every index that is read, wherever its border sends it."""
    if border in (Border.REFLECT, Border.CIRCULAR):
        low, high = reach.needs(*interval)
        if low < -(size - 1) or high > 2 * size - 1:
            return  # the framework refuses such a border
    lo, hi = Link(0, reach, border).needs(*interval, size)
    assert 0 <= lo <= hi <= size
    for i in read(reach, *interval):
        if border is Border.FILL and not 0 <= i < size:
            continue
        if border is Border.REPLICATE:
            i = min(max(i, 0), size - 1)
        elif border is Border.CIRCULAR:
            i %= size
        elif border is Border.REFLECT:
            i = -i if i < 0 else 2 * (size - 1) - i if i >= size else i
        assert lo <= i < hi


@pytest.mark.parametrize("bad", [{"den": 0}, {"den": -1}, {"first": 1, "last": 0}])
def test_integers_that_describe_nothing(bad: dict[str, int]) -> None:
    """Refused when made."""
    with pytest.raises(ValueError, match="a reach needs"):
        Reach(**bad)


def moved(function: object, size: int, index: int) -> set[int]:
    """Outputs that change when one input index is perturbed."""
    x = torch.zeros(1, 1, size, dtype=torch.float64)
    y = x.clone()
    y[0, 0, index] = 1
    return set((function(x) != function(y)).nonzero()[:, -1].tolist())  # type: ignore[operator]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(12, 24))
def test_convolution_by_perturbation(kernel: int, stride: int, dilation: int, padding: int, size: int) -> None:
    """An output moves exactly where its reach holds the index on a tap."""
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return  # the framework refuses a window larger than the input
    weight = torch.ones(1, 1, kernel, dtype=torch.float64)
    reach = window_reach(kernel, stride, dilation, padding)
    for index in range(0, size, 5):
        for o in moved(lambda x: F.conv1d(x, weight, None, stride, padding, dilation), size, index):
            lo, hi = reach.needs(o, o + 1)
            assert lo <= index < hi
            assert (index - lo) % dilation == 0


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(4, 12))
def test_transposed_convolution_by_perturbation(
    kernel: int, stride: int, dilation: int, padding: int, size: int
) -> None:
    """The same for a transposed convolution."""
    weight = torch.ones(1, 1, kernel, dtype=torch.float64)
    reach = transposed_reach(kernel, stride, dilation, padding)

    def run(x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose1d(x, weight, None, stride, padding, dilation=dilation)

    if (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 < 1:
        return
    for index in range(0, size, 3):
        for o in moved(run, size, index):
            lo, hi = reach.needs(o, o + 1)
            assert lo <= index < hi
