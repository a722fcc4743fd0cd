"""Axes that go round: rows before the first are the last ones, and a region may lie across the seam.

Circular padding makes the first region read the last rows. Clipped to the value that is all of it, so that everything
before would be made whole. Where every operator on the axis gives the same at any place, rows are numbered on beyond both
ends instead, and row r is row r + `period`, of the input and of all that is computed from it:

    value of 6 rows       4  5 | 0  1  2  3  4  5 | 0  1
    as numbered          -2 -1 | 0  1  2  3  4  5 | 6  7        what [-2, 3) holds is read as [4, 6) and [0, 3)

Only values in memory as a whole (inputs, results of sweeps) are read round the seam; everything else is computed on rows as
they are numbered. Tiles may lie so; a slide has to begin somewhere. Enter at `periods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ranger_nn.core.graph import Graph, Node
from ranger_nn.core.program import Cut, Part, Read
from ranger_nn.core.reach import Border, Box, Interval, Link


def periods(graph: Graph, dims: Mapping[int, int]) -> dict[int, int] | None:
    """Rows after which each value on the axis `dims` repeats; None where the axis has an end, or nothing goes round."""
    values, found, round_ = graph.values, {v: graph.values[v].shape[d] for v, d in dims.items()}, False
    made = {v for node in graph.nodes for v in node.outputs}
    for node in graph.nodes:
        if not set(node.outputs) & set(dims) and not set(node.inputs) & set(dims):
            continue
        linked = _linked(graph, node, dims)
        if linked is None:
            return None
        own = {_period(found[v], link) for v, link in linked}
        if len(own) > 1 or None in own:
            return None
        for v, link in linked:
            size = values[v].shape[dims[v]]
            circular = link.border is Border.CIRCULAR and link != Link(link.out_dim)
            round_ |= circular and v in made
            if circular and found[v] != size:
                return None  # it goes round after another number of rows
        for period in own:
            found[node.outputs[0]] = period or 0
    whole = all(values[v].shape[dims[v]] >= period for v, period in found.items())
    return found if round_ and whole else None


def _linked(graph: Graph, node: Node, dims: Mapping[int, int]) -> list[tuple[int, Link]] | None:
    """Inputs whose rows the rows of the result follow; None where the operator is not the same at any place."""
    values, out = graph.values, node.outputs[0]
    place = dims.get(out)
    found = []
    for v, row in zip(node.inputs, node.rule.links, strict=True):
        for d, link in enumerate(row):
            if link is None or link.out_dim != place:
                continue
            if dims.get(v) != d or not _same_anywhere(link, values[v].shape[d], values[out].shape[place]):
                return None
            found.append((v, link))
    invariant = node.rule.pointwise or getattr(node.kernel, "shift_invariant", False)
    if place is not None and found and not (len(node.outputs) == 1 and invariant):
        return None
    return found


def _same_anywhere(link: Link, size: int, out: int) -> bool:
    """True where no border is filled: it goes round, or nothing outside is read."""
    if link.border is Border.CIRCULAR or link == Link(link.out_dim):
        return True
    lo, hi = link.reach.needs(0, out)
    return lo >= 0 and hi <= size


def _period(period: int, link: Link) -> int | None:
    """Rows of the result after which it repeats, where its input does after `period`."""
    reach = link.reach
    rows, rest = divmod(period * reach.den, max(1, reach.num))
    return None if rest or reach.num == 0 else rows


def pieces(rows: Interval, period: int) -> list[tuple[int, int, int]]:
    """Parts (first numbered row, first row in memory, length) of `rows`, in order."""
    found, at = [], rows[0]
    while at < rows[1]:
        start = at % period
        length = min(rows[1] - at, period - start)
        found.append((at, start, length))
        at += length
    return found


def read_round(read: Read, box: Box, dim: int, period: int) -> Read:
    """`read` takes all rows of `dim` from one slot; the same for those of `box`, in pieces."""
    ((slot, cuts),) = read.parts
    others = tuple(c for c in cuts if c[0] != dim)
    parts: list[Part] = []
    for _, start, length in pieces(box[dim], period):
        cut: Cut = (dim, start, length)
        parts.append((slot, (*others, cut)))
    (lo, hi), (a, b) = read.box[dim], box[dim]
    nbytes = read.nbytes * (b - a) // max(1, hi - lo)
    return replace(read, parts=tuple(parts), dim=dim, nbytes=nbytes, box=box)
