"""What a rolled slide needs: bytes at each point of its sweeps, and multiply-adds.

    inference   values that cross from sweep to sweep, and of the sweep that runs: its windows, and of one step the rows
                that later nodes have yet to read
    training    besides these: of every value with a window the rows by which it moves on (a step is computed again from
                them), and in backward all rows of one step and the gradients of the values that cross
    checkpoint  in place of the rows of all steps: all windows once for each segment, and while backward is in a segment
                the rows of its steps

Enter at `cost`; `checkpointed` sets the segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ranger_nn.core.graph import COMPUTED, PARAMETER, Graph
from ranger_nn.planning.forward import Demand
from ranger_nn.planning.rolled import SLICE, WINDOW, Call, Flow, Loop
from ranger_nn.planning.stages import Stages


@dataclass(frozen=True)
class Cost:
    """Bytes at the peak of each level, the level and node that bind, and multiply-adds."""

    peaks: tuple[int, ...]
    saved: tuple[int, ...]
    binding: int
    macs: int

    @property
    def peak(self) -> int:
        """The highest."""
        return max(self.peaks, default=0)


def last_levels(graph: Graph, stages: Stages, demand: Demand) -> dict[int, int]:
    """Level at which each value is last read from memory."""
    last: dict[int, int] = {}
    for at, (level, sweep) in enumerate(zip(stages.levels, demand.sweeps, strict=True)):
        for k in (*level.prologue, *sweep.nodes):
            for v in graph.nodes[k].inputs:
                last[v] = at
    for v in graph.outputs:
        last[v] = len(stages.levels)
    return last


def held(graph: Graph, stages: Stages, demand: Demand) -> list[set[int]]:
    """For each level the computed values in memory while its sweep runs: made before or by it, read by it or later."""
    last = last_levels(graph, stages, demand)
    made: dict[int, int] = {}
    for at, (level, sweep) in enumerate(zip(stages.levels, demand.sweeps, strict=True)):
        for k in (*level.prologue, *level.reduces):
            made |= dict.fromkeys(graph.nodes[k].outputs, at)
        made |= dict.fromkeys(sweep.sinks, at)
    results = set(graph.outputs)
    return [
        {v for v, at in made.items() if at <= now <= last.get(v, at) and v not in results}
        for now in range(len(stages.levels))
    ]


def cost(graph: Graph, stages: Stages, demand: Demand, loops: Sequence[Loop | None], training: bool) -> Cost:
    """Bytes and multiply-adds of a rolled plan; a sweep without a loop runs in one step."""
    values = graph.values
    keep = held(graph, stages, demand)
    peaks, saved, macs, binding, most = [], [], 0, -1, -1
    for at, (level, sweep, loop) in enumerate(zip(stages.levels, demand.sweeps, loops, strict=True)):
        stored = sum(values[v].nbytes for v in keep[at])
        step, where = _prologue(graph, level.prologue)
        macs += sum(graph.nodes[k].macs for k in level.prologue)
        if sweep.nodes:
            found = _in_one(graph, sweep.nodes) if loop is None else in_step(graph, loop)
            step, where = max((step, where), found)
        macs += _work(graph, sweep.nodes, loop)
        peaks.append(stored + step)
        saved.append(_saved(graph, loop) if training and loop is not None else 0)
        if peaks[-1] > most:
            most, binding = peaks[-1], where
    if not training:
        return Cost(tuple(peaks), tuple(saved), binding, macs)
    everything = set().union(*keep) if keep else set()
    stored = sum(values[v].nbytes for v in everything)
    whole = sum(values[v].nbytes for level in stages.levels for k in level.prologue for v in graph.nodes[k].outputs)
    back, last = [], last_levels(graph, stages, demand)
    for at, (sweep, loop) in enumerate(zip(demand.sweeps, loops, strict=True)):
        crossing = sum(values[v].nbytes for v in keep[at] if v in sweep.sinks or last.get(v, at) >= at)
        again = _all_rows(graph, sweep.nodes, loop)
        weights = {v for k in sweep.nodes for v in graph.nodes[k].inputs if values[v].kind == PARAMETER}
        sums = 2 * sum(values[v].nbytes for v in weights) if loop is not None else 0  # this step's, and so far
        if loop is not None and loop.segment:
            again = max(again, in_step(graph, loop)[0]) + _segment(graph, loop)
        back.append(stored + whole + crossing + sum(saved) + again + sums)
    peaks = [max(a + sum(saved[: n + 1]), b) for n, (a, b) in enumerate(zip(peaks, back, strict=True))]
    worst = max(range(len(peaks)), key=peaks.__getitem__, default=-1)
    nodes = (*stages.levels[worst].prologue, *demand.sweeps[worst].nodes) if worst >= 0 else ()
    if nodes and back[worst] == peaks[worst]:
        binding = max(nodes, key=lambda k: sum(values[v].nbytes for v in graph.nodes[k].outputs))
    once_more = sum(_work(graph, s.nodes, p) for s, p in zip(demand.sweeps, loops, strict=True) if p and p.segment)
    return Cost(tuple(peaks), tuple(saved), binding, 4 * macs + once_more)


def checkpointed(graph: Graph, loop: Loop) -> Loop:
    """The loop with segments of the length that needs the fewest bytes; itself where that is none."""

    def needs(loop: Loop) -> int:
        return _saved(graph, loop) + (_segment(graph, loop) if loop.segment else 0)

    found = [replace(loop, segment=n) for n in range(2, loop.stop - loop.start)]
    return min([loop, *reversed(found)], key=needs)


def row_bytes(graph: Graph, flow: Flow) -> int:
    """Bytes of one row."""
    return graph.values[flow.value].nbytes // max(1, flow.size)


def _prologue(graph: Graph, nodes: Sequence[int]) -> tuple[int, int]:
    worst = (0, -1)
    for k in nodes:
        node = graph.nodes[k]
        out = sum(graph.values[v].nbytes for v in node.outputs)
        inputs = [graph.values[v].nbytes for v in node.inputs]
        worst = max(worst, (out + node.kernel.scratch(out, inputs), k))
    return worst


def _in_one(graph: Graph, nodes: Sequence[int]) -> tuple[int, int]:
    """Peak of nodes run whole, one after the other; what is stored is counted elsewhere."""
    last = {v: k for k in nodes for v in graph.nodes[k].inputs}
    made = {v for k in nodes for v in graph.nodes[k].outputs}
    live, worst = 0, (0, -1)
    for k in nodes:
        node = graph.nodes[k]
        out = sum(graph.values[v].nbytes for v in node.outputs)
        inputs = [graph.values[v].nbytes for v in node.inputs]
        worst = max(worst, (live + out + node.kernel.scratch(out, inputs), k))
        live += out
        live -= sum(graph.values[v].nbytes for v in {*node.inputs, *node.outputs} if v in made and last.get(v, k) == k)
    return worst


def in_step(graph: Graph, loop: Loop) -> tuple[int, int]:
    """Peak of one step, windows included, and the node that binds."""
    carried = sum(f.kept * row_bytes(graph, f) for f in loop.flows.values()) + _slices(graph, loop)
    last = {t.value: c.node for c in loop.calls for t in c.takes if t.source == WINDOW}
    shown = _shown(graph, loop)
    live, worst = carried, (carried, -1)
    for call in loop.calls:
        node = graph.nodes[call.node]
        taken = _taken(graph, call, loop.flows)
        copies = sum(n for (n, copied), t in zip(taken, call.takes, strict=True) if copied and t.source == WINDOW)
        flow = None if call.lifts else loop.flows[node.outputs[0]]
        out = flow.rate * row_bytes(graph, flow) if flow is not None else 0
        scratch = node.kernel.scratch(out, [n for n, _ in taken])
        joined = flow.rows * row_bytes(graph, flow) if flow is not None and flow.kept else 0
        worst = max(worst, (live + copies + out + max(scratch, joined), call.node))
        if flow is not None and flow.value in last:
            live += flow.rows * row_bytes(graph, flow)
        live -= sum(
            loop.flows[v].rows * row_bytes(graph, loop.flows[v])
            for v in {t.value for t in call.takes if t.source == WINDOW}
            if last[v] == call.node and v not in shown
        )
        if flow is not None and flow.value in shown and flow.value not in last:
            live += flow.rate * row_bytes(graph, flow)
    return worst


def _shown(graph: Graph, loop: Loop) -> set[int]:
    """Values that are held until the step ends: read by another group than their own, or results."""
    found = set(loop.sinks)
    for group in loop.groups:
        own = {graph.nodes[c.node].outputs[0] for c in group.calls if not c.lifts}
        found |= {
            t.value for c in group.calls for t in c.takes if t.source == WINDOW and (c.lifts or t.value not in own)
        }
    return found


def _slices(graph: Graph, loop: Loop) -> int:
    """Rows of stored values, which are fetched before a step and held until its end."""
    takes = {(t.value, t.dim, t.first, t.length) for c in loop.calls for t in c.takes if t.source == SLICE}
    return sum(length * (graph.values[v].nbytes // max(1, graph.values[v].shape[d])) for v, d, _, length in takes)


def _taken(graph: Graph, call: Call, flows: Mapping[int, Flow]) -> list[tuple[int, bool]]:
    """Bytes of each input, and whether they are copied out of something larger."""
    found = []
    for take in call.takes:
        value = graph.values[take.value]
        if take.source == WINDOW:
            flow = flows[take.value]
            found.append((take.length * row_bytes(graph, flow), take.length < flow.rows))
        elif take.source == SLICE:
            found.append((take.length * (value.nbytes // max(1, value.shape[take.dim])), True))
        else:
            found.append((value.nbytes if value.kind == COMPUTED else 0, False))
    return found


def _saved(graph: Graph, loop: Loop) -> int:
    if loop.segment:
        return loop.segments * sum(f.kept * row_bytes(graph, f) for f in loop.flows.values())
    steps = loop.stop - loop.start
    return sum(f.block * steps * row_bytes(graph, f) for f in loop.flows.values())


def _segment(graph: Graph, loop: Loop) -> int:
    """What is saved of the steps of one segment, and the blocks of its checkpoint."""
    return sum(f.block * (loop.segment + f.parts) * row_bytes(graph, f) for f in loop.flows.values())


def _all_rows(graph: Graph, nodes: Sequence[int], loop: Loop | None) -> int:
    """Backward of one step: every value's rows, the gradients of the largest, and what one call takes beside them."""
    if loop is None:
        sizes = [graph.values[v].nbytes for k in nodes for v in graph.nodes[k].outputs]
        calls = []
        for k in nodes:
            out = sum(graph.values[v].nbytes for v in graph.nodes[k].outputs)
            calls.append((graph.nodes[k].kernel, out, [graph.values[v].nbytes for v in graph.nodes[k].inputs]))
            sizes.append(graph.nodes[k].kernel.tape(*calls[-1][1:]))
    else:
        calls = [(graph.nodes[c.node].kernel, *_called(graph, c, loop.flows)) for c in loop.calls]
        sizes = [f.rows * row_bytes(graph, f) for f in loop.flows.values()]
        sizes += [n for c in loop.calls for n, copied in _taken(graph, c, loop.flows) if copied]
        sizes.append(sum(f.kept * row_bytes(graph, f) for f in loop.flows.values()))
        sizes.append(sum(_tape(graph, c, loop.flows) for c in loop.calls))
    workspace = max((kernel.backward(out, taken) for kernel, out, taken in calls), default=0)
    return sum(sizes) + 2 * max(sizes, default=0) + workspace


def _tape(graph: Graph, call: Call, flows: Mapping[int, Flow]) -> int:
    """What the back end's autodiff keeps of one node, beyond its inputs and output."""
    node = graph.nodes[call.node]
    out, taken = _called(graph, call, flows)
    safe = 0 if node.kernel.tame or call.lifts else out + sum(taken)  # rows at the border once more, made safe
    return int(node.kernel.tape(out, taken)) + safe


def _called(graph: Graph, call: Call, flows: Mapping[int, Flow]) -> tuple[int, list[int]]:
    """Bytes that one call gives, and those that it takes."""
    flow = None if call.lifts else flows[graph.nodes[call.node].outputs[0]]
    out = flow.rate * row_bytes(graph, flow) if flow is not None else 0
    return out, [n for n, _ in _taken(graph, call, flows)]


def _work(graph: Graph, nodes: Sequence[int], loop: Loop | None) -> int:
    if loop is None:
        return sum(graph.nodes[k].macs for k in nodes)
    total = 0
    for group in loop.groups:
        for call in group.calls:
            node = graph.nodes[call.node]
            if call.lifts:
                total += node.macs
                continue
            flow = loop.flows[node.outputs[0]]
            total += node.macs * flow.rate * (group.stop - group.start) // max(1, flow.size)
    return total
