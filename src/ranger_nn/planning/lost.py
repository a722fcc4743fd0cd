"""What is lost where an operator stays whole: the operators after it that could have been cut.

The graph is looked at once more as if each whole operator kept its dimensions where they are; what is regional then and
is not now, and depends on it, is lost. Enter at `lost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ranger_nn.bounds.axes import Axis, find_axes
from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import Graph, Node, Rule
from ranger_nn.core.reach import Link, Reach
from ranger_nn.planning.stages import PROLOGUE, Stages, stage


def lost(graph: Graph, stages: Stages, axes: Sequence[Axis]) -> dict[int, set[int]]:
    """For each node that stays whole, those after it that are not cut along `axes` but could be, were it local."""
    barriers = {k for k in stages.reasons if stages.kind[k] == PROLOGUE}
    barriers |= {k for k, node in enumerate(graph.nodes) if node.rule.reason and stages.kind[k] == PROLOGUE}
    if not barriers:
        return {}
    while True:
        nodes = tuple(_local(graph, n) if k in barriers else n for k, n in enumerate(graph.nodes))
        other = replace(graph, nodes=nodes)
        found = [a for a in find_axes(other) if not axes or any(_same(graph, a, b) for b in axes)]
        bounds = Bounds(other, tuple(found))
        would = stage(bounds)
        behind = {k for k in would.reasons if _keeps_shape(graph, graph.nodes[k])} - barriers
        if not behind:
            break
        barriers |= behind  # one whole operator after another, as a transform and its inverse
    open_again = {k for k, kind in enumerate(stages.kind) if kind == PROLOGUE and would.kind[k] != PROLOGUE} - barriers
    cut = {k for k in barriers if any(bounds.is_cut(v) for v in graph.nodes[k].inputs)}
    return {k: _after(graph, k) & open_again for k in sorted(cut)}


def _same(graph: Graph, a: Axis, b: Axis) -> bool:
    return any(v in a.dims and a.dims[v] == b.dims.get(v) for v in graph.inputs)


def _local(graph: Graph, node: Node) -> Node:
    """The node as if each dimension of its result followed from one of its inputs'; one of several results stays as it is."""
    values = graph.values
    if len(node.outputs) != 1:
        return node
    out = values[node.outputs[0]].shape
    rows = tuple(_matched(values[v].shape, out) for v in node.inputs)
    return replace(node, rule=Rule(rows), random=False)


def _keeps_shape(graph: Graph, node: Node) -> bool:
    return any(graph.values[v].shape == graph.values[node.outputs[0]].shape for v in node.inputs)


def _matched(shape: tuple[int, ...], out: tuple[int, ...]) -> tuple[Link | None, ...]:
    """Dimensions in the same place where the rank stays, else of the same size from the left."""
    if len(shape) == len(out):
        pairs = list(enumerate(shape))
        return tuple(Link(d, Reach(n, 0, n - 1, out[d])) if n > 1 and out[d] > 1 else None for d, n in pairs)
    free = list(range(len(out)))
    row: list[Link | None] = []
    for n in shape:
        d = next((d for d in free if out[d] == n and n > 1), None)
        free = [f for f in free if d is None or f > d]
        row.append(None if d is None else Link(d))
    return tuple(row)


def _after(graph: Graph, k: int) -> set[int]:
    """Nodes that depend on node k."""
    reached = set(graph.nodes[k].outputs)
    found = set()
    for n in range(k + 1, len(graph.nodes)):
        if reached.intersection(graph.nodes[n].inputs):
            found.add(n)
            reached.update(graph.nodes[n].outputs)
    return found
