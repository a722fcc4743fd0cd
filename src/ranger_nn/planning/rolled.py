"""A rolled slide: one step body for each sweep, which a framework's own loop repeats.

The rows of a step are chosen so that every value advances by a whole number of rows at each step (its rate). A result
starts at row 0; what it needs runs ahead by a constant, got by following the reaches backwards without clipping. So
each reader takes, at every step, a constant number of rows at a constant place, and every shape is fixed:

    value v      before step t                          made by step t
    ... -------- [ rate*t + ahead - kept ... rate*t + ahead ) [ ... + rate )
                   carried from step to step: the window
    reader                 [ rate*t + first ... + length )

Rows below 0 and beyond the size are border: they are made like all others, and masked where a reader looks at them.
Enter at `roll`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import Graph, Node
from ranger_nn.core.reach import IDENTITY, Border, Link
from ranger_nn.ops.pointwise import opaque
from ranger_nn.planning.forward import Sweep, sweep_users
from ranger_nn.planning.stages import REDUCE, Stages

MOST_PARTS = 16
"""Largest denominator of a reach that is slid along; beyond it a step would need too many rows."""
FEW_STEPS = 4
"""But where so many steps of as many rows are left, it may be larger: tokens that are rows and columns of a map."""
GROUP_COST = {False: 0.01, True: 0.03}
"""Share of a sweep's work that a group of nodes with a condition of its own must save, in inference and in training,
where conditions cost more of the back end's compiler."""

WHOLE, WINDOW, SLICE = "whole", "window", "slice"


@dataclass(frozen=True, slots=True)
class Flow:
    """A value that a sweep makes: step t makes its rows [rate*t + ahead, rate*(t+1) + ahead).

    `kept`: rows before these that are still to be read; `start`, `stop`: steps that make rows which are needed;
    `masked`: rows outside of the value must be zero; `needed`: the rows on which results depend.
    """

    value: int
    dim: int | None
    rate: int
    ahead: int
    kept: int
    size: int
    start: int
    stop: int
    masked: bool = False
    needed: tuple[int, int] = (0, 0)

    @property
    def rows(self) -> int:
        """Rows at hand in a step."""
        return self.kept + self.rate

    @property
    def block(self) -> int:
        """Rows by which the window moves on: no more than it has."""
        return min(self.kept, self.rate)

    @property
    def parts(self) -> int:
        """Blocks that make up the window."""
        return -(-self.kept // self.block) if self.kept else 0


@dataclass(frozen=True, slots=True)
class Take:
    """What a node reads of one input in step t: rows [rate*t + first, ... + length) of a window or of a stored value.

    `fill`: what rows outside must hold, where they must be masked when they are read.
    """

    value: int
    source: str
    dim: int = 0
    rate: int = 0
    first: int = 0
    length: int = 0
    fill: float | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One node in a step; `lifts`: a reduction takes the rows that the step makes."""

    node: int
    takes: tuple[Take, ...]
    lifts: bool = False


@dataclass(frozen=True)
class Group:
    """Calls that run in steps [start, stop) only."""

    calls: tuple[Call, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Loop:
    """One sweep, rolled: steps [start, stop), of which [0, steps) make results.

    `segment`: in training, steps from one checkpoint of all windows to the next; 0: no checkpoints, the new rows of every
    step are saved.
    """

    flows: Mapping[int, Flow]
    groups: tuple[Group, ...]
    sinks: tuple[int, ...]
    reduces: tuple[int, ...]
    start: int
    stop: int
    steps: int
    segment: int = 0

    @property
    def segments(self) -> int:
        """Checkpoints in all; the last segment may be shorter."""
        return -(-(self.stop - self.start) // self.segment) if self.segment else 0

    @property
    def calls(self) -> list[Call]:
        """All calls, in order."""
        return [call for group in self.groups for call in group.calls]

    @property
    def reads(self) -> tuple[int, ...]:
        """Values from outside of the sweep."""
        found = {t.value: None for c in self.calls for t in c.takes if t.source != WINDOW}
        return tuple(found)


def links(bounds: Bounds, node: Node) -> list[Link | None]:
    """For each input the link of its cut dimension, None where it has none or is read whole."""
    found: list[Link | None] = []
    for i, v in enumerate(node.inputs):
        d = bounds.dim(v, 0)
        found.append(None if d is None or bounds.blocked(node, i, 0) else node.rule.links[i][d])
    return found


def rates(bounds: Bounds, nodes: Sequence[int]) -> tuple[dict[int, Fraction], dict[int, int], list[int]]:
    """Rows of each value for one row of its component's first value, the component of each value, and nodes that
    do not fit: two ways from one value to another with different scales.
    """
    graph = bounds.graph
    edges: dict[int, list[tuple[int, Fraction, int]]] = {}
    for k in nodes:
        out = graph.nodes[k].outputs[0]
        for v, link in zip(graph.nodes[k].inputs, links(bounds, graph.nodes[k]), strict=True):
            if link is None:
                continue
            scale = Fraction(link.reach.num, link.reach.den)
            edges.setdefault(out, []).append((v, scale, k))
            edges.setdefault(v, []).append((out, 1 / scale, k))
    found: dict[int, Fraction] = {}
    component: dict[int, int] = {}
    bad: list[int] = []
    for root in edges:
        if root in found:
            continue
        found[root], component[root] = Fraction(1), root
        todo = [root]
        while todo:
            v = todo.pop()
            for u, scale, k in edges[v]:
                if u not in found:
                    found[u], component[u] = found[v] * scale, root
                    todo.append(u)
                elif found[u] != found[v] * scale:
                    bad.append(k)
    return found, component, bad


def rollable(graph: Graph, bounds: Bounds) -> Graph:
    """The graph in which nodes that cannot be slid along evenly are opaque: they run whole, and the plan says why."""
    nodes = list(graph.nodes)
    for k, node in enumerate(nodes):
        if node.rule.reason or len(node.outputs) != 1:
            continue
        reason = _uneven(bounds, node)
        if reason:
            nodes[k] = _whole(graph, node, reason)
    bounds = replace(bounds, graph=replace(graph, nodes=tuple(nodes)))
    while True:
        regional = [k for k, n in enumerate(nodes) if not n.rule.reason and bounds.dim(n.outputs[0], 0) is not None]
        bad = rates(bounds, regional)[2]
        if not bad:
            return bounds.graph
        k = max(bad, key=lambda k: (_scale(bounds, nodes[k]).denominator, k))
        nodes[k] = _whole(graph, nodes[k], "its rows do not keep step with those of the values around it")
        bounds = replace(bounds, graph=replace(graph, nodes=tuple(nodes)))


def _scale(bounds: Bounds, node: Node) -> Fraction:
    found = [Fraction(k.reach.num, k.reach.den) for k in links(bounds, node) if k is not None]
    return max(found, key=lambda f: f.denominator, default=Fraction(1))


def _uneven(bounds: Bounds, node: Node) -> str:
    if _from_one(bounds, node):
        return "it makes rows of one row, of which no region could take a part"
    for link in links(bounds, node):
        if link is None:
            continue
        if link.border in (Border.REFLECT, Border.CIRCULAR):
            return f"its border is {link.border.value}: rows from the far side or mirrored"
        parts = Fraction(link.reach.num, link.reach.den).denominator
        if link.reach.num == 0 or parts > max(MOST_PARTS, bounds.size(node.outputs[0], 0) // FEW_STEPS):
            return f"{link.reach.num}/{link.reach.den} input rows to an output row: no even step"
    return ""


def _from_one(bounds: Bounds, node: Node) -> bool:
    """Whether rows that are cut come from a dimension of length one, which lies on no axis, and the kernel asks for a window
    of it.
    """
    values, out = bounds.graph.values, node.outputs[0]
    if bounds.size(out, 0) == 1:
        return False
    found = any(
        link is not None and link.out_dim == bounds.dim(out, 0) and values[v].shape[d] == 1 and link.reach != IDENTITY
        for v, row in zip(node.inputs, node.rule.links, strict=True)
        for d, link in enumerate(row)
    )
    return found and not node.kernel.single


def _whole(graph: Graph, node: Node, reason: str) -> Node:
    return replace(node, rule=opaque([graph.values[v].shape for v in node.inputs], reason))


def roll(bounds: Bounds, stages: Stages, sweep: Sweep, steps: int, training: bool = False) -> Loop:
    """The sweep in about `steps` steps (as near as even rates allow)."""
    return _Roller(bounds, stages, sweep, steps).loop(GROUP_COST[training])


class _Roller:
    """Works out rates, leads and windows of one sweep, from its results backwards."""

    def __init__(self, bounds: Bounds, stages: Stages, sweep: Sweep, steps: int) -> None:
        self.bounds, self.stages, self.sweep, self.graph = bounds, stages, sweep, bounds.graph
        self.users = sweep_users(self.graph, sweep.nodes)
        self.regional = [k for k in sweep.nodes if stages.kind[k] != REDUCE]
        self.made = {self.graph.nodes[k].outputs[0] for k in self.regional}
        self.rate = self._rates(steps)
        self.ahead: dict[int, int] = {}
        for k in reversed(self.regional):
            v = self.graph.nodes[k].outputs[0]
            ends = [self._rows(u, i)[1] for u, i in self._readers(v)]
            self.ahead[v] = max(ends) - self.rate[v] if ends else 0

    def _rates(self, steps: int) -> dict[int, int]:
        scales, component, _ = rates(self.bounds, self.sweep.nodes)
        groups: dict[int, list[int]] = {}
        for v, root in component.items():
            groups.setdefault(root, []).append(v)
        found: dict[int, int] = {}
        for members in groups.values():
            unit = lcm(*(scales[v].denominator for v in members))
            least = {v: int(scales[v] * unit) for v in members}
            made = [v for v in members if v in self.made] or members
            most = max(-(-self.bounds.size(v, 0) // least[v]) for v in made)
            multiple = max(1, -(-most // steps))
            found |= {v: n * multiple for v, n in least.items()}
        for k in self.sweep.nodes:  # a value that no link ties to another
            for v in (self.graph.nodes[k].outputs[0], *self.graph.nodes[k].inputs):
                if v not in found:
                    found[v] = max(1, -(-self.bounds.size(v, 0) // steps))
        return found

    def _readers(self, v: int) -> list[tuple[int, int]]:
        """Readers in the sweep that ask for certain rows: all but reductions, which take rows as they are made."""
        found = [(k, i) for k, i in self.users.get(v, ()) if self.stages.kind[k] != REDUCE]
        return [(k, i) for k, i in found if links(self.bounds, self.graph.nodes[k])[i] is not None]

    def _rows(self, k: int, i: int) -> tuple[int, int]:
        """Rows of input i that step 0 of node k reads."""
        node = self.graph.nodes[k]
        link = links(self.bounds, node)[i]
        out = node.outputs[0]
        assert link is not None
        return link.reach.needs(self.ahead[out], self.ahead[out] + self.rate[out])

    def loop(self, price: float) -> Loop:
        """All of it."""
        needed = self._needed()
        flows = {}
        for k in self.regional:
            v = self.graph.nodes[k].outputs[0]
            flows[v] = self._flow(v, needed[v])
        calls = [(self._call(k, flows), self._active(k, flows)) for k in self.sweep.nodes]
        groups = grouped(calls, self._weights(), price)
        stops = [-(-self.bounds.size(v, 0) // self.rate[v]) for v in self.made if not self._readers(v)]
        reduces = tuple(k for k in self.sweep.nodes if self.stages.kind[k] == REDUCE)
        start, stop = min(g.start for g in groups), max(g.stop for g in groups)
        return Loop(flows, groups, tuple(sorted(self.sweep.sinks)), reduces, start, stop, max(stops, default=1))

    def _needed(self) -> dict[int, tuple[int, int]]:
        """Rows of each value that matter."""
        found: dict[int, tuple[int, int]] = {}
        for k in reversed(self.regional):
            v = self.graph.nodes[k].outputs[0]
            size = self.bounds.size(v, 0)
            whole = v in self.sweep.sinks or len(self._readers(v)) < len(self.users.get(v, ()))
            parts = [(0, size)] if whole else []
            for u, i in self._readers(v):
                parts.append(self.bounds.needs(self.graph.nodes[u], i, 0, *found[self.graph.nodes[u].outputs[0]]))
            parts = [p for p in parts if p[1] > p[0]]
            found[v] = (min(a for a, _ in parts), max(b for _, b in parts)) if parts else (0, 0)
        return found

    def _flow(self, v: int, needed: tuple[int, int]) -> Flow:
        rate, ahead = self.rate[v], self.ahead[v]
        firsts = [self._rows(k, i)[0] for k, i in self._readers(v)]
        kept = max(0, ahead - min(firsts, default=ahead))
        fills = {self._fill(k, i) for k, i in self._readers(v)} - {None}
        start, stop = (needed[0] - ahead) // rate, -(-(needed[1] - ahead) // rate)
        dim = self.bounds.dim(v, 0)
        return Flow(v, dim, rate, ahead, kept, self.bounds.size(v, 0), start, stop, fills == {0.0}, needed)

    def _fill(self, k: int, i: int) -> float | None:
        """What rows outside of input i must hold, if node k reads any for a row of its output."""
        node = self.graph.nodes[k]
        link, fill = links(self.bounds, node)[i], node.kernel.fill(i)
        if link is None or fill is None:
            return None
        lo, hi = link.reach.needs(0, self.bounds.size(node.outputs[0], 0))
        return fill if lo < 0 or hi > self.bounds.size(node.inputs[i], 0) else None

    def _call(self, k: int, flows: Mapping[int, Flow]) -> Call:
        node = self.graph.nodes[k]
        if self.stages.kind[k] == REDUCE:
            v = node.inputs[0]
            rest = [Take(u, WHOLE) for u in node.inputs[1:]]
            return Call(k, (self._lifted(v, flows), *rest), True)
        takes = []
        for i, (v, link) in enumerate(zip(node.inputs, links(self.bounds, node), strict=True)):
            if link is None:
                takes.append(Take(v, WHOLE))
                continue
            lo, hi = self._rows(k, i)
            fill = self._fill(k, i)
            flow = flows.get(v)
            if flow is not None and flow.masked:
                fill = None
            source = SLICE if flow is None else WINDOW
            dim = self.bounds.dim(v, 0)
            takes.append(Take(v, source, dim or 0, self.rate[v], lo, hi - lo, fill))
        return Call(k, tuple(takes))

    def _lifted(self, v: int, flows: Mapping[int, Flow]) -> Take:
        dim = self.bounds.dim(v, 0) or 0
        if v in flows:
            return Take(v, WINDOW, dim, self.rate[v], self.ahead[v], self.rate[v])
        return Take(v, SLICE, dim, self.rate[v], 0, self.rate[v])

    def _active(self, k: int, flows: Mapping[int, Flow]) -> tuple[int, int]:
        node = self.graph.nodes[k]
        if self.stages.kind[k] != REDUCE:
            flow = flows[node.outputs[0]]
            return flow.start, flow.stop
        v = node.inputs[0]
        if v in flows:
            return flows[v].start, flows[v].stop
        return 0, -(-self.bounds.size(v, 0) // self.rate[v])

    def _weights(self) -> list[int]:
        values = self.graph.values
        return [
            self.graph.nodes[k].macs + 8 * sum(values[v].nbytes for v in self.graph.nodes[k].outputs)
            for k in self.sweep.nodes
        ]


def grouped(calls: Sequence[tuple[Call, tuple[int, int]]], weights: Sequence[int], price: float) -> tuple[Group, ...]:
    """Calls in groups that each run in the steps that any of theirs needs: least idle work and few groups."""
    n = len(calls)
    lengths = [b - a for _, (a, b) in calls]
    price *= sum(w * length for w, length in zip(weights, lengths, strict=True))
    best: list[float] = [0.0] + [float("inf")] * n
    back = [0] * (n + 1)
    for j in range(1, n + 1):
        start, stop = calls[j - 1][1]
        weight = useful = 0
        for i in range(j - 1, -1, -1):
            a, b = calls[i][1]
            start, stop = min(start, a), max(stop, b)
            weight += weights[i]
            useful += weights[i] * lengths[i]
            cost = best[i] + weight * (stop - start) - useful + price
            if cost < best[j]:
                best[j], back[j] = cost, i
    found: list[Group] = []
    j = n
    while j:
        part = calls[back[j] : j]
        found.append(Group(tuple(c for c, _ in part), min(a for _, (a, _) in part), max(b for _, (_, b) in part)))
        j = back[j]
    return tuple(reversed(found))
