"""Check a rolled sweep by code that did not make it: what every reader takes is at hand, and every result is covered.

Follows the rows of each value step by step, as integers, through the windows as the executor would keep them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import Graph
from ranger_nn.errors import PlanError
from ranger_nn.planning.rolled import SLICE, WINDOW, Loop


def verify_loop(loop: Loop, graph: Graph, bounds: Bounds, nodes: Sequence[int]) -> None:
    """Raise PlanError where a reader's rows are not at hand, are not those that its link asks for, or a row is missing."""
    order = [c.node for c in loop.calls]
    if order != sorted(nodes):
        raise PlanError(f"a sweep of {len(nodes)} nodes runs {len(order)} calls, or in another order")
    seen: set[int] = set()
    for group in loop.groups:
        for call in group.calls:
            node = graph.nodes[call.node]
            for i, take in enumerate(call.takes):
                if take.source == WINDOW:
                    _at_hand(loop, node.name, take.value, take.rate, take.first, take.length, seen)
                if take.source in (WINDOW, SLICE) and not call.lifts:
                    _asked_for(loop, graph, bounds, call.node, i)
            if not call.lifts:
                seen.add(node.outputs[0])
                _covers(loop, node.outputs[0], group.start, group.stop)
    if loop.segment:
        _checkpoints(loop)


def _at_hand(loop: Loop, name: str, v: int, rate: int, first: int, length: int, seen: set[int]) -> None:
    flow = loop.flows[v]
    lowest, highest = flow.ahead - flow.kept, flow.ahead + flow.rate
    if v not in seen or rate != flow.rate or first < lowest or first + length > highest:
        raise PlanError(
            f"{name} takes rows [{first}, {first + length}) of value {v}; at hand are [{lowest}, {highest})"
        )


def _asked_for(loop: Loop, graph: Graph, bounds: Bounds, k: int, i: int) -> None:
    node, take = graph.nodes[k], loop_call(loop, k).takes[i]
    out, link = loop.flows[node.outputs[0]], graph.nodes[k].rule.links[i][take.dim]
    if link is None:
        raise PlanError(f"{node.name} reads input {i} whole, but takes rows of it")
    for t in (loop.start, 0, loop.stop):
        lo, hi = link.reach.needs(out.rate * t + out.ahead, out.rate * (t + 1) + out.ahead)
        if (lo, hi - lo) != (take.rate * t + take.first, take.length):
            raise PlanError(f"{node.name} asks for rows [{lo}, {hi}) of input {i} in step {t}, and takes {take}")


def loop_call(loop: Loop, k: int):  # type: ignore[no-untyped-def]
    """The call of node k."""
    return next(c for c in loop.calls if c.node == k)


def _covers(loop: Loop, v: int, start: int, stop: int) -> None:
    flow = loop.flows[v]
    if v in loop.sinks and (flow.rate * start + flow.ahead > 0 or flow.rate * stop + flow.ahead < flow.size):
        raise PlanError(f"value {v} of {flow.size} rows is made in steps [{start}, {stop}) only")
    if start > flow.start or stop < flow.stop:
        raise PlanError(
            f"value {v} is needed in steps [{flow.start}, {flow.stop}), its group runs in [{start}, {stop})"
        )


def _checkpoints(loop: Loop) -> None:
    """Backward finds the window of every step: in the checkpoint before it and the new rows of the steps since."""
    seen: list[int] = []
    for first in range(loop.start, loop.start + loop.segments * loop.segment, loop.segment):
        steps = range(first, min(first + loop.segment, loop.stop))
        seen += steps
        for v, flow in loop.flows.items() if first == loop.start else ():
            held = set(range(flow.rate * first + flow.ahead - flow.kept, flow.rate * first + flow.ahead))
            for t in steps:
                end = flow.rate * t + flow.ahead
                wanted = set(range(end - flow.kept, end))
                if not wanted <= held:
                    raise PlanError(f"before step {t} rows {sorted(wanted - held)} of value {v} were not saved")
                held |= set(range(end + flow.rate - flow.block, end + flow.rate))
    if seen != list(range(loop.start, loop.stop)):
        raise PlanError(
            f"{loop.segments} segments of {loop.segment} steps are not the steps [{loop.start}, {loop.stop})"
        )
