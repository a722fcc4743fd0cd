"""Axes: which dimension of each value belongs to the same spatial (or time) axis of the network.

Links join dimensions: rows of the image, rows of every feature map, the token dimension of a flattened map. A
joined class is an axis along which the network can be partitioned. Enter at `find_axes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranger_nn.bounds.circle import periods
from ranger_nn.core.graph import COMPUTED, INPUT, NHWC, PARAMETER, Graph, Value

SPATIAL = {1: ("time",), 2: ("rows", "columns"), 3: ("depth", "rows", "columns")}
"""What the spatial dimensions of a series, an image and a volume are called."""


@dataclass(frozen=True)
class Axis:
    """One partitionable axis: `dims` maps a value to its dimension on it; `name` is for people; along an `ordered` one an
    operator's steps follow one another; `periods`, of one that goes round, see `bounds/circle.py`.
    """

    name: str
    dims: dict[int, int]
    size: int
    ordered: bool = False
    periods: dict[int, int] | None = None


def _find(parent: dict[tuple[int, int], tuple[int, int]], key: tuple[int, int]) -> tuple[int, int]:
    root = key
    while parent.setdefault(root, root) != root:
        root = parent[root]
    while parent[key] != root:
        parent[key], key = root, parent[key]
    return root


def _contracted(graph: Graph) -> list[tuple[int, int]]:
    """Channels: dimensions that an operator with weights reads whole, or that a reduction gathers in groups."""
    grouped = [(node.inputs[0], d) for node in graph.nodes for d in node.rule.indivisible]
    return grouped + [
        (node.inputs[0], d)
        for node in graph.nodes
        if node.macs and not node.rule.reason and any(graph.values[v].kind == PARAMETER for v in node.inputs[1:])
        for d, link in enumerate(node.rule.links[0])
        if link is None
    ]


def _channel(value: Value) -> int:
    """The dimension of an image's channels; -1 where the value is none."""
    rank = len(value.shape)
    return -1 if rank < 4 else rank - 1 if value.layout == NHWC else 1


def find_axes(graph: Graph) -> list[Axis]:
    """Axes in the order in which the planner should cut them: rows before columns; the batch is left out."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}
    values = graph.values
    for node in graph.nodes:
        if len(node.outputs) != 1 and node.rule.ordered is None:
            continue
        out = node.outputs[0]
        for v, row in zip(node.inputs, node.rule.links, strict=True):
            for d, link in enumerate(row):
                if link is None or values[v].shape[d] < 2 or values[out].shape[link.out_dim] < 2:
                    continue
                a, b = _find(parent, (v, d)), _find(parent, (out, link.out_dim))
                parent[a] = b
    classes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for key in parent:
        classes.setdefault(_find(parent, key), []).append(key)
    ordered = {_find(parent, key) for key in _steps(graph) if key in parent}
    batch = {(v, 0) for v in graph.inputs if len(values[v].shape) > 2} | _samples(graph)
    contracted = {_find(parent, key) for key in _contracted(graph) if key in parent}
    found = []
    for root, members in classes.items():
        dims = dict(members)
        if root in contracted or not set(dims) & set(graph.inputs):
            continue
        if len(dims) != len(members) or (root not in ordered and batch & set(members)):
            continue
        weight = sum(values[v].nbytes for v in dims if values[v].kind in (COMPUTED, INPUT))
        first = min((d, v) for v, d in members if v in graph.inputs)
        found.append((weight, first, root not in ordered, dims))
    if not found:
        return []
    heaviest = max(w for w, _, _, _ in found)
    kept = sorted(((free, first, -w, dims) for w, first, free, dims in found if w * 4 >= heaviest), key=lambda f: f[:3])
    spatial = [k for k in kept if not k[0] or k[1][0] != _channel(values[k[1][1]])] or kept
    return [
        Axis(name, dims, max(values[v].shape[d] for v, d in dims.items()), not free, periods(graph, dims))
        for name, (free, _, _, dims) in zip(_names(graph, spatial[:3]), spatial[:3], strict=True)
    ]


def _steps(graph: Graph) -> list[tuple[int, int]]:
    """Dimensions whose steps follow one another: an axis even where they come first, and the one to slide along."""
    return [(n.inputs[0], n.rule.ordered) for n in graph.nodes if n.rule.ordered is not None]


def _samples(graph: Graph) -> set[tuple[int, int]]:
    """The batch of an operator whose steps may come before it."""
    return {
        (n.inputs[0], d)
        for n in graph.nodes
        if n.rule.ordered is not None
        for d, link in enumerate(n.rule.links[0])
        if link is not None and d != n.rule.ordered
    }


def _names(graph: Graph, found: Sequence[tuple[bool, tuple[int, int], int, dict[int, int]]]) -> list[str]:
    """Time where steps follow one another; for a lone axis of an image or a volume what it is there; else in order."""
    free = [first for may, first, _, _ in found if may]
    names = SPATIAL.get(len(free), ())
    if len(free) == 1:
        dim, v = free[0]
        value = graph.values[v]
        places = [d for d in range(1, len(value.shape)) if d != _channel(value)]
        if len(value.shape) >= 4 and dim in places and len(places) in SPATIAL:
            names = (SPATIAL[len(places)][places.index(dim)],)
        elif len(found) > 1:
            names = ("rows",)
    spatial = iter(names)
    return [next(spatial) if may else "time" for may, *_ in found]
