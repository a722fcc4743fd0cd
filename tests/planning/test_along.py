"""The axis that is slid along: the longest, or the one that the user cuts; sizes of regions go with their axes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ranger_nn.bounds.axes import SPATIAL, Axis
from ranger_nn.core.graph import INPUT, Graph, Value
from ranger_nn.planning.along import LONG, slide_first

Sizes = st.lists(st.integers(1, 100), min_size=1, max_size=3)


def axes_of(sizes: list[int]) -> tuple[Graph, list[Axis]]:
    """A graph that is its input, and an axis for each of its spatial dimensions."""
    value = Value(0, "x", (1, 3, *sizes), "float32", 4, INPUT)
    names = SPATIAL[len(sizes)]
    return Graph("net", (value,), (), (0,), (0,)), [Axis(names[n], {0: n + 2}, size) for n, size in enumerate(sizes)]


@given(Sizes)
def test_the_longest_where_it_is_far_longer(sizes: list[int]) -> None:
    """Else the first; the others keep their order."""
    graph, axes = axes_of(sizes)
    found, regions = slide_first(graph, axes, None)
    assert regions is None
    assert found[0].size == (max(sizes) if max(sizes) >= LONG * sizes[0] else sizes[0])
    rest = [a for a in axes if a is not found[0]]
    assert found[1:] == rest


@given(Sizes, st.lists(st.integers(1, 120), min_size=1, max_size=3))
def test_regions_go_with_their_axes(sizes: list[int], regions: list[int]) -> None:
    """The only axis that a region cuts comes first; where it cuts none or several, the first."""
    graph, axes = axes_of(sizes)
    found, ordered = slide_first(graph, axes, tuple(regions))
    if len(regions) > len(axes) or len(axes) < 2:
        assert (found, ordered) == (axes, tuple(regions))
        return
    full = (*regions, *sizes[len(regions) :])
    assert ordered is not None
    assert sorted(zip((a.name for a in found), ordered)) == sorted(zip((a.name for a in axes), full))
    cut = [a for a, r in zip(axes, full) if r < a.size]
    assert found[0] is (cut[0] if len(cut) == 1 else axes[0])


def test_steps_that_follow_one_another_come_first() -> None:
    """However short time is: along another axis they could not be cut."""
    graph, (time, other) = axes_of([5, 100])
    time = replace(time, name="time", ordered=True)
    assert slide_first(graph, [time, other], None) == ([time, other], None)
    assert slide_first(graph, [time, other], (5, 10)) == ([time, other], (5, 10))
