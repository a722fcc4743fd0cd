"""Rows made again in place of rows kept: a skip connection whose window is long.

    x -> a -> b -> pool -> ... -> up -> concat(b, up)      b runs ahead of concat by all rows of the way between
    x -> a -> b -> pool -> ... -> up -> concat(b', up)     b' from copies of its nodes: they run when concat does
    x -> a'-> b'

The window of b, and in training what is saved of it, shrink to what pool needs, for the work of a and b once more. It is
the choice between storing and computing again that Halide's schedules make (Ragan-Kelley et al. 2013, section 3), and
rematerialisation in the sense of Chen et al. 2016, decided for one value. Enter at `long_windows` and `remade`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ranger_nn.core.graph import COMPUTED, Graph
from ranger_nn.planning.budget import format_bytes
from ranger_nn.planning.rolled import WINDOW, Loop
from ranger_nn.planning.rolled_cost import row_bytes

SHARE = 0.1
"""Of the network's work, what the copies for one value may take."""
WORTH = 0.1
"""Of all bytes in a sweep's windows, what one value must free."""


@dataclass(frozen=True)
class Again:
    """A value that is made again for `readers` from copies of `nodes` (both positions): its window gets `rows` shorter."""

    value: int
    readers: tuple[int, ...]
    nodes: tuple[int, ...]
    rows: int
    nbytes: int


def long_windows(graph: Graph, loop: Loop) -> list[Again]:
    """Values whose late readers could do with copies: first the one that frees the most bytes."""
    seeds = {v for node in graph.nodes if node.random for v in node.outputs}
    least = WORTH * sum(f.kept * row_bytes(graph, f) for f in loop.flows.values())
    found = []
    for flow in loop.flows.values():
        takes = [(c.node, t) for c in loop.calls if not c.lifts for t in c.takes]
        readers = [(k, t.first) for k, t in takes if t.source == WINDOW and t.value == flow.value]
        firsts = sorted({first for _, first in readers})
        gaps = [(b - a, a) for a, b in pairwise(firsts)]
        if not flow.kept or not gaps:
            continue
        rows, last = max(gaps)
        rows = min(rows, flow.kept)
        nodes = _chain(graph, loop.flows, flow.value)
        copied = [graph.nodes[k] for k in nodes]
        # noise is drawn for the rows of a step: others would get other noise
        noisy = any(node.random or seeds.intersection(node.inputs) for node in copied)
        if noisy or rows * row_bytes(graph, flow) < least or sum(n.macs for n in copied) > SHARE * graph.macs():
            continue
        late = dict.fromkeys(k for k, first in readers if first <= last)
        found.append(Again(flow.value, tuple(late), nodes, rows, rows * row_bytes(graph, flow)))
    return sorted(found, key=lambda a: -a.nbytes)


def _chain(graph: Graph, made: Collection[int], value: int) -> tuple[int, ...]:
    """Positions of the nodes that make `value` in its sweep, from what the sweep reads."""
    found: set[int] = set()
    todo = [value]
    by_value = {v: k for k, node in enumerate(graph.nodes) for v in node.outputs if v in made}
    while todo:
        k = by_value.get(todo.pop())
        if k is not None and k not in found:
            found.add(k)
            todo += graph.nodes[k].inputs
    return tuple(sorted(found))


def remade(graph: Graph, again: Again) -> Graph:
    """The graph in which the late readers read a copy, made right before the first of them."""
    values, own = list(graph.values), {}
    for k in again.nodes:
        for v in graph.nodes[k].outputs:
            own[v] = len(values)
            values.append(replace(graph.values[v], index=len(values), kind=COMPUTED))
    copies = [
        replace(
            graph.nodes[k],
            inputs=tuple(own.get(v, v) for v in graph.nodes[k].inputs),
            outputs=tuple(own[v] for v in graph.nodes[k].outputs),
        )
        for k in again.nodes
    ]
    nodes = []
    for k, node in enumerate(graph.nodes):
        if k == again.readers[0]:
            nodes += copies
        if k in again.readers:
            node = replace(node, inputs=tuple(own[v] if v == again.value else v for v in node.inputs))
        nodes.append(node)
    return replace(graph, values=tuple(values), nodes=tuple(nodes))


def shifted(cuts: Sequence[int], again: Again) -> tuple[int, ...]:
    """Positions of cuts in the new graph."""
    return tuple(cut + len(again.nodes) if cut > again.readers[0] else cut for cut in cuts)


def told(graph: Graph, again: Again, axis: str) -> str:
    """For the plan; `axis`: the name of what is slid along."""
    maker = next(n for n in graph.nodes if again.value in n.outputs)
    reader = graph.nodes[again.readers[0]]
    return (
        f"{maker.name}: made again for {reader.name}, {again.rows} {axis} later ({len(again.nodes)} operators); "
        f"its window takes {format_bytes(again.nbytes)} less"
    )
