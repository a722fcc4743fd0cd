"""Along which axis a slide goes: the first of those given to it.

A step, and the window that each value keeps from one step to the next, are as long as the other axes. So of a long image
rows are made after rows, of a wide one columns after columns. Enter at `slide_first`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ranger_nn.bounds.axes import Axis
from ranger_nn.core.graph import COMPUTED, Graph
from ranger_nn.core.reach import IDENTITY, Border

LONG = 2
"""How many times as long as the first an axis is that is slid along in its place: rows lie together in memory."""


def input_size(graph: Graph, axis: Axis) -> int:
    """Elements along an axis: of the input, whatever the network makes of it."""
    sizes = [graph.values[v].shape[d] for v, d in axis.dims.items() if v in graph.inputs]
    return max(sizes, default=axis.size)


def wraps(graph: Graph, axis: Axis) -> bool:
    """True where the first region would read the last rows of a computed value: a circle has no end to begin at."""
    values = graph.values
    for node in graph.nodes:
        out = node.outputs[0]
        for v, row in zip(node.inputs, node.rule.links, strict=True):
            link = row[axis.dims[v]] if v in axis.dims and values[v].kind == COMPUTED else None
            if link is not None and link.border is Border.CIRCULAR and link.out_dim == axis.dims.get(out):
                same = values[v].shape[axis.dims[v]] == values[out].shape[link.out_dim]
                if not same or link.reach != IDENTITY:
                    return True
    return False


def slide_first(
    graph: Graph, axes: Sequence[Axis], regions: tuple[int, ...] | None
) -> tuple[list[Axis], tuple[int, ...] | None]:
    """Axes with the one to slide along first, and the user's sizes of a region (input elements) in the same order.

    It is the only one of which a region has not all, without regions the longest. Steps that follow one another
    (`Axis.ordered`) stay first: along another axis they could not be cut.
    """
    if len(axes) < 2 or axes[0].ordered or (regions is not None and len(regions) > len(axes)):
        return list(axes), regions
    sizes = [input_size(graph, a) for a in axes]
    if regions is None:
        open_ends = [n for n, a in enumerate(axes) if not wraps(graph, a)] or list(range(len(axes)))
        longest = max(open_ends, key=sizes.__getitem__)
        first = longest if sizes[longest] >= LONG * sizes[open_ends[0]] else open_ends[0]
    else:
        cut = [n for n, r in enumerate(regions) if r < sizes[n]]
        first = cut[0] if len(cut) == 1 else 0
        regions = (*regions, *sizes[len(regions) :])
    order = sorted(range(len(axes)), key=lambda n: n != first)
    return [axes[n] for n in order], None if regions is None else tuple(regions[n] for n in order)
