"""Partitions that follow from shapes: every element in exactly one region, windows that sum to one, refusals."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranger_nn import Blocks, Grid, KMeans, PartitionError, TimeSlices
from ranger_nn.aggregate import Call, Concat, Extremum, Moments, Softmax, WeightedMean
from ranger_nn.core.region import AxisPartition

sizes = st.lists(st.integers(1, 17), min_size=1, max_size=3)


def cover(partition: AxisPartition, shape: tuple[int, ...]) -> np.ndarray:
    """How often each element is owned."""
    times = np.zeros(shape, int)
    for region in partition.regions(shape):
        times[tuple(slice(a, b) for a, b in region.own)] += 1
        for (a, b), (lo, hi), size in zip(region.own, region.read, shape):
            assert 0 <= lo <= a < b <= hi <= size
    return times


@given(sizes, st.data(), st.integers(0, 5))
def test_grid_covers_once(shape: list[int], data: st.DataObject, overlap: int) -> None:
    counts = [data.draw(st.integers(1, n)) for n in shape]
    grid = Grid(*counts, overlap=overlap)
    assert (cover(grid, tuple(shape)) == 1).all()
    assert len(grid.regions(shape)) == prod(counts) == grid.count
    lengths = [{b - a for r in grid.regions(shape) for a, b in [r.own[d]]} for d in range(len(shape))]
    assert all(max(n) - min(n) <= 1 for n in lengths)


@given(sizes, st.integers(1, 20))
def test_grid_by_size_covers_once(shape: list[int], length: int) -> None:
    grid = Grid(size=[length] * len(shape))
    assert (cover(grid, tuple(shape)) == 1).all()
    assert all(b - a <= length for r in grid.regions(shape) for a, b in r.own)


@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.one_of(st.integers(1, 9), st.floats(0.05, 1)),
    st.sampled_from(["cosine", "linear"]),
)
def test_windows_are_a_partition_of_unity(size: int, count: int, overlap: int | float, window: str) -> None:
    grid = Grid(min(count, size), overlap=overlap, window=window)
    total = np.zeros(size)
    for (_, (lo, hi)), weights in zip(grid.intervals(size, 0), grid.blend(size, 0) or []):
        assert min(weights) >= 0
        total[lo:hi] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-12)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 4))
def test_time_slices_cover_once(steps: int, length: int, overlap: int) -> None:
    assert (cover(TimeSlices(length=length, overlap=overlap), (steps,)) == 1).all()
    assert (cover(TimeSlices(min(length, steps), overlap=overlap), (steps,)) == 1).all()


def test_the_article_s_five_by_five() -> None:
    """3 + 2 by 3 + 2."""
    assert Blocks(2, 2).matrix(5, 5) == ([(0, 3), (3, 5)], [(0, 3), (3, 5)])
    assert [r.own for r in Grid(2, 2).regions((5, 5))] == [
        ((0, 3), (0, 3)),
        ((0, 3), (3, 5)),
        ((3, 5), (0, 3)),
        ((3, 5), (3, 5)),
    ]


def test_coordinates_do_not_depend_on_resolution() -> None:
    """The same place has the same coordinate in a fine and in a coarse array."""
    grid = Grid(4, overlap=0.5, window="cosine")
    coarse, fine = grid.coordinates(40, 0), grid.coordinates(120, 0)
    for a, b in zip(coarse, fine):
        np.testing.assert_allclose(a, b[1::3], atol=1e-12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Grid(), "counts or a size"),
        (lambda: Grid(2, size=3), "not both"),
        (lambda: Grid(0, 2), "positive"),
        (lambda: Grid(1, 1, 1, 1), "one to three axes"),
        (lambda: Grid(2, window="cosin", overlap=1), "did you mean 'cosine'"),
        (lambda: Grid(2, window="cosine"), "give an overlap"),
        (lambda: Grid(2, overlap=-1), "-1"),
        (lambda: Grid(2, 2, axes=(1,)), "one axis for each"),
        (lambda: Grid(6).regions((5,)), "6 regions .* 5 elements; ask for at most 5"),
        (lambda: TimeSlices(), "number or a length"),
        (lambda: TimeSlices(3, length=4), "number=3 and length=4"),
        (lambda: TimeSlices(9).regions((4,)), "9 regions"),
        (lambda: TimeSlices(2, overlap=-1), "-1"),
        (lambda: Grid(2, 2, axes=(2, 2)), "different integers"),
        (lambda: Grid(2, axes=(1.5,)), "different integers"),  # type: ignore[arg-type]
        (lambda: Grid(2, overlap=float("nan")), "nan"),
        (lambda: TimeSlices(2, axis="x"), "different integers"),  # type: ignore[arg-type]
        (lambda: Blocks(0), "positive"),
        (lambda: KMeans(2.5), "clusters of KMeans is an integer"),  # type: ignore[arg-type]
        (lambda: Extremum(3), "1 .maximum. or -1"),
        (lambda: Moments(correction=-1.0), "0 or more"),
        (lambda: WeightedMean((1.0, float("inf"))), "finite"),
        (lambda: WeightedMean(("a", "b")), "or numbers"),  # type: ignore[arg-type]
        (lambda: Softmax(hidden=2.5), "is an integer"),  # type: ignore[arg-type]
        (lambda: Concat("x"), "is an integer"),  # type: ignore[arg-type]
        (lambda: Call(3), "takes a callable"),  # type: ignore[arg-type]
        (lambda: Blocks(3).regions((2,)), "3 regions"),
    ],
)
def test_refusals(make: object, says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        make()  # type: ignore[operator]
