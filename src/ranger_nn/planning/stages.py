"""Stages: which node runs in which sweep, what crosses from one sweep to the next.

A value that is reduced over a cut axis, or read whole, is finished only when its sweep is done, so what uses it
runs in a later one. Optional cuts (positions in topological order) end a sweep earlier to keep windows short.

    level L:   prologue (nodes that touch no cut axis, or read whole values)   then   sweep (regional nodes)

Enter at `stage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import COMPUTED

REGIONAL, REDUCE, PROLOGUE = "regional", "reduce", "prologue"
STEPS = "each step needs the state of the step before, so tiles along time are not independent (a slide is exact)"


@dataclass
class Stage:
    """One level: node indices of its prologue, its own regional nodes and its reductions."""

    prologue: list[int] = field(default_factory=list)
    regional: list[int] = field(default_factory=list)
    reduces: list[int] = field(default_factory=list)


@dataclass
class Stages:
    """All levels, the kind and level of each node, and for each value the levels at which it is read.

    `weights`: nodes that depend on parameters alone, at the level of their first reader (`planning/weights.py`).
    """

    levels: list[Stage]
    kind: list[str]
    level: list[int]
    producer: dict[int, int]
    whole_reads: dict[int, list[int]]
    reasons: dict[int, str]
    weights: set[int] = field(default_factory=set)


def _linked(bounds: Bounds, k: int) -> bool:
    """True where every cut dimension of the node's output follows from an input, or the kernel makes it."""
    node = bounds.graph.nodes[k]
    if node.kernel.generates:
        return True
    known = {link.out_dim for row in node.rule.links for link in row if link is not None}
    dims = [bounds.dim(node.outputs[0], a) for a in range(len(bounds.axes))]
    return all(d is None or d in known for d in dims)


def _in_order(bounds: Bounds, k: int, slides: bool) -> bool:
    """True unless the node's steps follow one another and are not met in order: only the first axis is slid along."""
    node = bounds.graph.nodes[k]
    if node.rule.ordered is None:
        return True
    where = [a for a in range(len(bounds.axes)) if bounds.dim(node.outputs[0], a) == node.rule.ordered]
    return slides and where == [0]


def stage(bounds: Bounds, cuts: Sequence[int] = (), slides: bool = True) -> Stages:
    """Assign every node a level and a kind; `slides`: the first axis is slid along, not tiled."""
    graph = bounds.graph
    kind: list[str] = []
    level: list[int] = []
    producer = {v: k for k, n in enumerate(graph.nodes) for v in n.outputs}
    whole: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    axes = range(len(bounds.axes))

    def segment(k: int) -> int:
        return sum(1 for c in cuts if c <= k)

    for k, node in enumerate(graph.nodes):
        computed = [(i, v) for i, v in enumerate(node.inputs) if graph.values[v].kind == COMPUTED]
        blocked = [(i, v) for i, v in enumerate(node.inputs) if any(bounds.blocked(node, i, a) for a in axes)]
        single = len(node.outputs) == 1 or node.rule.ordered is not None
        out_cut = single and bounds.is_cut(node.outputs[0])
        at = 0
        if node.rule.reduces and blocked and not out_cut:
            kinds = REDUCE
        elif (
            out_cut and not node.random and not node.rule.reason and _linked(bounds, k) and _in_order(bounds, k, slides)
        ):
            kinds = REGIONAL
        else:
            kinds = PROLOGUE
        for i, v in computed:
            p = producer[v]
            ready = level[p] + (kind[p] == REDUCE)
            streamed = kind[p] == REGIONAL
            if v in graph.nodes[p].states:
                ready = level[p] + streamed
            elif streamed and (
                kinds == PROLOGUE or (kinds == REGIONAL and any(bounds.blocked(node, i, a) for a in axes))
            ):
                ready = level[p] + 1
                whole.setdefault(v, []).append(k)
            elif streamed and kinds != PROLOGUE and segment(p) < segment(k):
                ready = level[p] + 1
            at = max(at, ready)
        cut = any(bounds.is_cut(v) for v in node.inputs)
        if kinds == PROLOGUE and cut and node.rule.ordered is not None:
            reasons[k] = STEPS
        elif kinds == PROLOGUE and (cut or node.kernel.chunk):
            reasons[k] = node.rule.reason or "reads all of its input, or makes a dimension of its own"
        elif kinds == REGIONAL and blocked:
            reasons[k] = node.rule.reason or "reads all of an input"
        kind.append(kinds)
        level.append(at)
    levels = [Stage() for _ in range(max(level, default=0) + 1)]
    for k in range(len(graph.nodes)):
        here = levels[level[k]]
        {REGIONAL: here.regional, REDUCE: here.reduces, PROLOGUE: here.prologue}[kind[k]].append(k)
    return Stages(levels, kind, level, producer, whole, reasons)
