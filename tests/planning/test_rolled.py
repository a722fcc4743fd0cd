"""Rolled slides on hand-made graphs: what every reader takes is at hand, each row is made once, bytes fall with the steps."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranger_nn.bounds.axes import find_axes
from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import COMPUTED, INPUT, NHWC, Graph, Node, Rule, Value
from ranger_nn.core.reach import IDENTITY, Border, Link, Reach
from ranger_nn.errors import BudgetError, InputError, PlanError
from ranger_nn.ops.reduction import reduction
from ranger_nn.planning.forward import Schedule, demand
from ranger_nn.planning.rolled import WINDOW, Loop, roll, rollable
from ranger_nn.planning.rolled_cost import checkpointed
from ranger_nn.planning.rolled_search import make_rolled
from ranger_nn.planning.search import Options
from ranger_nn.planning.stages import stage
from ranger_nn.planning.verify_rolled import verify_loop


class Kernel:
    """What the planner asks of a kernel."""

    tame = True

    generates = False

    def __init__(self, fill: float | None = None) -> None:
        self.given = fill

    def fill(self, position: int) -> float | None:
        return self.given

    def scratch(self, out_bytes: int, in_bytes: object) -> int:
        return 0

    def tape(self, out_bytes: int, in_bytes: object) -> int:
        return 0

    def backward(self, out_bytes: int, in_bytes: object) -> int:
        return 0


class Net:
    """A graph put together node by node; values are (1, rows, columns, 8). Columns are read whole, unless `both` axes are
    alike.
    """

    def __init__(self, rows: int, columns: int = 64, both: bool = False) -> None:
        self.values = [Value(0, "x", (1, rows, columns, 8), "float32", 4, INPUT, layout=NHWC)]
        self.nodes: list[Node] = []
        self.both = both

    def local(
        self, *inputs: int, rows: int | None = None, reach: Reach = IDENTITY, border: Border = Border.FILL
    ) -> int:
        """A node that reads all inputs through `reach`; with a reach, rows outside are zero."""
        index = len(self.values)
        shape = self.values[inputs[0]].shape
        out = (1, rows or shape[1], *shape[2:])
        row = (Link(0), Link(1, reach, border), Link(2, reach) if self.both else None, None)
        self.values.append(Value(index, f"v{index}", out, "float32", 4, COMPUTED, True))
        kernel = Kernel(None if reach is IDENTITY else 0.0)
        self.nodes.append(Node(f"n{index}", "local", inputs, (index,), Rule((row,) * len(inputs)), kernel, 1000))
        return index

    def mean(self, v: int) -> int:
        """A reduction over rows and columns."""
        index = len(self.values)
        shape = self.values[v].shape
        self.values.append(Value(index, f"v{index}", (1, 1, 1, shape[3]), "float32", 4, COMPUTED, True))
        self.nodes.append(Node(f"n{index}", "mean", (v,), (index,), reduction(shape, (1, 2), True), Kernel(), 0))
        return index

    def graph(self, *outputs: int) -> Graph:
        """The finished graph."""
        return Graph("net", tuple(self.values), tuple(self.nodes), (0,), outputs)


THREE, DOWN, UP = Reach(1, -1, 1), Reach(2, -1, 1), Reach(1, 0, 0, 2)


def unet(rows: int) -> Graph:
    """Down, up, and a skip connection."""
    net = Net(rows)
    skip = net.local(0, reach=THREE)
    low = net.local(net.local(skip, rows=rows // 2, reach=DOWN), reach=THREE)
    up = net.local(low, rows=rows, reach=UP)
    return net.graph(net.local(net.local(up, skip), reach=THREE))


def rolled(graph: Graph, steps: int) -> tuple[Loop, Bounds]:
    """The only sweep of a graph."""
    bounds = Bounds(graph, tuple(find_axes(graph)[:1]))
    stages = stage(bounds)
    (sweep,) = [s for s in demand(bounds, stages, Schedule(1, (1,))).sweeps if s.nodes]
    return roll(bounds, stages, sweep, steps), bounds


def test_a_convolution_leads_by_its_halo_and_keeps_two_rows() -> None:
    """Two 3-row convolutions: the first is one row ahead and keeps the two rows that overlap."""
    net = Net(32)
    net.local(0, reach=THREE)
    loop, _ = rolled(net.graph(net.local(1, reach=THREE)), 4)
    first, last = loop.flows[1], loop.flows[2]
    assert (first.rate, first.ahead, first.kept, first.masked) == (8, 1, 2, True)
    assert (last.rate, last.ahead, last.kept) == (8, 0, 0)
    assert (loop.start, loop.stop) == (-1, 4)


def test_rates_are_whole_rows_at_every_resolution() -> None:
    """Half the rows where the network has half of them."""
    loop, _ = rolled(unet(64), 8)
    assert {f.rate for f in loop.flows.values()} == {8, 4}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(4, 60).map(lambda n: 2 * n),
    steps=st.integers(2, 12),
    first=st.integers(-4, 0),
    last=st.integers(0, 4),
)
def test_what_is_taken_is_at_hand(rows: int, steps: int, first: int, last: int) -> None:
    """The check that shares no code with the rolling agrees, and windows cover every row of the results."""
    net = Net(rows)
    skip = net.local(0, reach=Reach(1, first, last))
    low = net.local(skip, rows=rows // 2, reach=Reach(2, first, last))
    up = net.local(low, rows=rows, reach=UP)
    graph = net.graph(net.local(up, skip, reach=Reach(1, first, last)), skip)
    loop, bounds = rolled(graph, steps)
    verify_loop(loop, graph, bounds, [c.node for c in loop.calls])
    for v in loop.sinks:
        flow = loop.flows[v]
        made = [
            r
            for t in range(flow.start, flow.stop)
            for r in range(flow.rate * t + flow.ahead, flow.rate * (t + 1) + flow.ahead)
        ]
        assert set(range(rows)) <= set(made)
        assert len(made) == len(set(made))


def test_the_check_sees_a_window_that_is_too_short() -> None:
    """A plan that forgets rows is refused."""
    graph = unet(64)
    loop, bounds = rolled(graph, 8)
    v = next(t.value for c in loop.calls for t in c.takes if t.source == WINDOW and loop.flows[t.value].kept)
    flows = {**loop.flows, v: replace(loop.flows[v], kept=0)}
    with pytest.raises(PlanError, match="at hand are"):
        verify_loop(replace(loop, flows=flows), graph, bounds, [c.node for c in loop.calls])


def test_two_ways_of_different_scale_are_not_slid_along() -> None:
    """One of the two runs whole, and the plan says so."""
    net = Net(60)
    third = net.local(0, rows=20, reach=Reach(3, 0, 2))
    half = net.local(0, rows=20, reach=Reach(2, 0, 1))
    graph = net.graph(net.local(third, half))
    plan = make_rolled(graph, Options(regions=(6,)), False).plan
    assert any("do not keep step" in line for line in plan.whole)


def test_a_mirrored_border_runs_whole() -> None:
    """Rows from beyond the edge in another order are not in the window."""
    net = Net(32)
    net.local(0, reach=THREE, border=Border.REFLECT)
    graph = net.graph(1)
    found = rollable(graph, Bounds(graph, tuple(find_axes(graph)[:1])))
    assert "mirrored" in found.nodes[0].rule.reason


def test_a_reduction_ends_the_sweep() -> None:
    """What uses it runs in the next one; both have loops of their own."""
    net = Net(4096)
    y = net.local(0, reach=THREE)
    scale = net.mean(y)
    index = len(net.values)
    net.values.append(Value(index, "scaled", net.values[y].shape, "float32", 4, COMPUTED, True))
    links = ((Link(0), Link(1), Link(2), Link(3)), (Link(0), None, None, Link(3)))
    net.nodes.append(Node("scaled", "multiply", (y, scale), (index,), Rule(links, pointwise=True), Kernel(), 0))
    found = make_rolled(net.graph(index), Options(regions=(256,)), False)
    assert [loop is not None for loop in found.loops] == [True, True]
    assert found.plan.sweeps[0].stored >= net.values[y].nbytes


def test_less_memory_takes_more_steps() -> None:
    """Down to the least, whose error names it."""
    graph = unet(8192)
    large = make_rolled(graph, Options(), False).plan
    small = make_rolled(graph, Options(allowed=large.projected // 4), False).plan
    assert small.projected <= large.projected // 4
    assert small.steps > large.steps
    with pytest.raises(BudgetError, match="the least that a plan needs") as caught:
        make_rolled(graph, Options(allowed=1000), False)
    assert make_rolled(graph, Options(allowed=caught.value.least), False).plan.projected <= caught.value.least


def test_checkpoints_where_nothing_else_fits() -> None:
    """Rows of every step as long as they fit; the plan says where not, counts the work, and tells the least."""
    graph = unet(65536)
    with pytest.raises(BudgetError, match="the least that a plan needs") as caught:
        make_rolled(graph, Options(allowed=1000), True)
    least = caught.value.least
    assert least is not None
    tight = make_rolled(graph, Options(allowed=least), True).plan
    assert tight.projected <= least
    (segment,) = [r.checkpoint for r in tight.sweeps if r.checkpoint]
    assert f"a checkpoint every {segment} steps" in str(tight)
    assert tight.extra_macs > 0.6
    tries = (make_rolled(graph, Options(allowed=n * least // 2), True).plan for n in range(2, 100))
    roomy = next(plan for plan in tries if not any(r.checkpoint for r in plan.sweeps))
    assert "checkpoint" not in str(roomy)
    assert roomy.extra_macs < tight.extra_macs
    assert not any(r.checkpoint for r in make_rolled(graph, Options(allowed=least), False).plan.sweeps)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(8, 60).map(lambda n: 2 * n), steps=st.integers(4, 30), segment=st.integers(1, 9))
def test_windows_are_put_together_from_checkpoints(rows: int, steps: int, segment: int) -> None:
    """At every step of every segment; what is saved is no more than counted."""
    graph = unet(rows)
    loop, bounds = rolled(graph, steps)
    loop = replace(loop, segment=segment)
    verify_loop(loop, graph, bounds, [c.node for c in loop.calls])
    assert loop.segments * segment >= loop.stop - loop.start
    best = checkpointed(graph, loop)
    if best.segment:
        verify_loop(best, graph, bounds, [c.node for c in best.calls])


def test_the_check_sees_segments_that_leave_steps_out() -> None:
    """Every step is in one of them."""
    graph = unet(64)
    loop, bounds = rolled(graph, 16)

    class Short(Loop):
        segments = 2

    short = Short(**{f.name: getattr(loop, f.name) for f in fields(loop)} | {"segment": 3})
    with pytest.raises(PlanError, match="2 segments of 3 steps are not the steps"):
        verify_loop(short, graph, bounds, [c.node for c in loop.calls])


def alike(rows: int, columns: int) -> Graph:
    """Three convolutions over rows and columns."""
    net = Net(rows, columns, both=True)
    return net.graph(net.local(net.local(net.local(0, reach=THREE), reach=THREE), reach=THREE))


def test_slid_along_the_longer_axis() -> None:
    """Rows, unless there are at least twice as many columns: a window is as long as the other axis. The plan says which."""
    assert make_rolled(alike(2048, 2048), Options(), False).plan.axes == ("rows",)
    assert make_rolled(alike(2048, 3000), Options(), False).plan.axes == ("rows",)
    wide, high = (make_rolled(alike(*size), Options(), False).plan for size in ((256, 16384), (16384, 256)))
    assert (wide.axes, high.axes) == (("columns",), ("rows",))
    assert wide.projected == high.projected
    assert "1 sweeps along columns\n" in str(wide)
    assert "1 sweeps\n" in str(high)


def test_the_other_axis_where_the_first_needs_too_much() -> None:
    """Along the 900 columns a window is as long as the 512 rows: less than the least along rows."""
    graph = alike(512, 900)
    with pytest.raises(BudgetError) as caught:
        make_rolled(graph, Options(allowed=1000), False)
    plan = make_rolled(graph, Options(allowed=caught.value.least), False).plan
    assert plan.axes == ("columns",)
    assert plan.projected <= caught.value.least
    assert make_rolled(graph, Options(allowed=4 * plan.projected), False).plan.axes == ("rows",)


def test_regions_say_along_which_axis() -> None:
    """The one of which a region has not all; one size is of the first."""
    graph = alike(512, 512)
    for regions, axis, steps in (((64,), "rows", 8), ((64, 512), "rows", 8), ((512, 32), "columns", 16)):
        plan = make_rolled(graph, Options(regions=regions), False).plan
        assert (plan.axes, plan.steps) == ((axis,), steps), regions
    with pytest.raises(InputError, match=r"along \(rows, columns\), of sizes \(512, 512\): give one size"):
        make_rolled(graph, Options(regions=(64, 32)), False)


def test_regions_are_of_the_input() -> None:
    """Whatever the network's largest value is."""
    net = Net(64)
    graph = net.graph(net.local(net.local(0, rows=128, reach=UP), reach=THREE))
    plan = make_rolled(graph, Options(regions=(16,)), False).plan
    assert (plan.steps, plan.sweeps[0].region) == (4, "32")


def test_tiles_are_refused() -> None:
    """The rule and the way out."""
    with pytest.raises(InputError, match="slid along, not tiled"):
        make_rolled(unet(64), Options(schedule="tile"), False)
