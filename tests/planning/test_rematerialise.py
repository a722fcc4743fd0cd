"""Rows made again in place of rows kept: which values, the graph with copies, and what it frees."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranger_nn.core.graph import Graph
from ranger_nn.core.reach import Reach
from ranger_nn.errors import BudgetError
from ranger_nn.planning import rolled_search
from ranger_nn.planning.rematerialise import long_windows, remade, shifted
from ranger_nn.planning.rolled_cost import row_bytes
from ranger_nn.planning.rolled_search import make_rolled
from ranger_nn.planning.search import Options
from ranger_nn.planning.verify_rolled import verify_loop
from tests.planning.test_rolled import DOWN, THREE, UP, Net, rolled


def deep(rows: int, below: int = 12) -> Graph:
    """A light way down, much work below it, and the skip connection around that."""
    net = Net(rows)
    low = net.local(skip := net.local(0, reach=THREE), rows=rows // 2, reach=DOWN)
    for _ in range(below):
        low = net.local(low, reach=THREE)
    return net.graph(net.local(net.local(low, rows=rows, reach=UP), skip))


def test_the_skip_is_found_and_its_window_goes() -> None:
    """Its reader far behind reads a copy; the other one keeps what it reads."""
    graph = deep(64)
    loop, _ = rolled(graph, 8)
    (again,) = long_windows(graph, loop)
    assert (again.value, again.nodes) == (1, (0,))
    assert [graph.nodes[k].inputs for k in again.readers] == [(len(graph.values) - 2, 1)]
    other = remade(graph, again)
    copy = other.nodes[again.readers[0]]
    assert (copy.inputs, copy.outputs, copy.kernel) == ((0,), (len(graph.values),), graph.nodes[0].kernel)
    assert other.outputs == graph.outputs
    shorter, bounds = rolled(other, 8)
    verify_loop(shorter, other, bounds, [c.node for c in shorter.calls])
    assert loop.flows[1].kept - shorter.flows[1].kept == again.rows
    assert again.nbytes == again.rows * row_bytes(graph, loop.flows[1])
    assert shorter.flows[len(graph.values)].kept == 0


def test_what_is_not_made_again() -> None:
    """What takes much of the work, what draws noise, and what is read at one place only."""
    graph = deep(64, below=3)  # its copy would be a sixth of the network
    assert not long_windows(graph, rolled(graph, 8)[0])
    graph = deep(64)
    noisy = replace(graph, nodes=(replace(graph.nodes[0], random=True), *graph.nodes[1:]))
    assert long_windows(graph, rolled(graph, 8)[0])
    assert not long_windows(noisy, rolled(graph, 8)[0])
    net = Net(64)
    x = 0
    for _ in range(12):
        x = net.local(x, reach=THREE)
    graph = net.graph(x)
    assert not long_windows(graph, rolled(graph, 8)[0])


def test_cuts_move_with_the_nodes() -> None:
    """Behind the copies by as many as there are."""
    graph = deep(64)
    (again,) = long_windows(graph, rolled(graph, 8)[0])
    at = again.readers[0]
    assert shifted((3, at, at + 1), again) == (3, at, at + 2)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(8, 40).map(lambda n: 2 * n),
    steps=st.integers(2, 12),
    below=st.integers(10, 16),
    first=st.integers(-3, 0),
    last=st.integers(0, 3),
)
def test_copies_are_at_hand(rows: int, steps: int, below: int, first: int, last: int) -> None:
    """The check that shares no code with the rolling agrees, whatever the skip is read through."""
    net = Net(rows)
    skip = net.local(0, reach=Reach(1, first, last))
    low = net.local(skip, rows=rows // 2, reach=Reach(2, first, last))
    for _ in range(below):
        low = net.local(low, reach=THREE)
    graph = net.graph(net.local(net.local(low, rows=rows, reach=UP), skip, reach=Reach(1, first, last)), skip)
    loop, _ = rolled(graph, steps)
    for again in long_windows(graph, loop):
        other = remade(graph, again)
        shorter, bounds = rolled(other, steps)
        verify_loop(shorter, other, bounds, [c.node for c in shorter.calls])
        kept = {v: f.kept for v, f in shorter.flows.items() if v < len(graph.values)}
        assert all(n <= loop.flows[v].kept for v, n in kept.items())


@pytest.mark.parametrize("training", [False, True])
def test_the_planner_comes_to_it_where_nothing_else_fits(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget below what is possible without; the plan says so, and counts the work."""
    graph = deep(4096)
    with monkeypatch.context() as patch:
        patch.setattr(rolled_search, "COPIES", 0)
        with pytest.raises(BudgetError) as without:
            make_rolled(graph, Options.checked(1000, None, None), training)
    with pytest.raises(BudgetError) as least:
        make_rolled(graph, Options.checked(1000, None, None), training)
    assert least.value.least < without.value.least
    plan = make_rolled(graph, Options.checked(least.value.least, None, None), training).plan
    assert plan.projected <= least.value.least
    assert [line.split(":")[0] for line in plan.again] == ["n1"]
    assert "made again for" in str(plan)
    assert plan.extra_macs > 0
    assert make_rolled(graph, Options.checked(without.value.least, None, None), training).plan.again == ()
