"""Sub-graphs of a graph in parts: the batch of some parts, and what a part reads. NumPy, no framework.

Nodes are numbered anew, part by part, once. A part is then a slice of the rows of every array over nodes, and its
in-edges are a slice of the edges, which are sorted by target (those of one target in the order given, so that sums
over in-edges keep their order to the last bit):

    rows       | part 0      | part 1    | part 2        |        starts  0       6     11         18
    edges      | in-edges of 0  | in-edges of 1  | of 2  |        offsets[row] : offsets[row + 1]

`Batches.batch` joins the slices of some parts and drops the edges that come from elsewhere: work in proportion to the
in-edges of these parts, never to the whole graph. `Ordered.reads` keeps all in-edges and adds the halo that they come
from. Enter at `Ordered.of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ranger_nn.errors import PartitionError
from ranger_nn.partition.graph import GraphSplit, cumulated, in_edges


@dataclass(frozen=True, eq=False)
class SubGraph:
    """Some rows of an ordered graph and edges among them, in numbers of their own from 0. Arrays are int64.

    Attributes:
        rows: (nodes,) the row of each node in the ordered graph; those asked for come first, then the halo.
        edges: (2, edges) source and target, sorted by target.
        offsets: (nodes + 1,) the in-edges of node i are `edges[:, offsets[i]:offsets[i + 1]]`.
        positions: (edges,) where each edge stands in the ordered graph; empty where nobody asked.
        own: how many of the nodes were asked for.
    """

    rows: np.ndarray
    edges: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray
    own: int


@dataclass(frozen=True, eq=False)
class Ordered:
    """A graph whose nodes are numbered by part. Arrays are int64.

    Attributes:
        order: (nodes,) the node, as given, of each row.
        starts: (parts + 1,) part p is rows `starts[p]` to `starts[p + 1]`.
        columns: (edges,) the column, as given, of each edge.
        sources: (edges,) the row from which each edge comes.
        offsets: (nodes + 1,) the in-edges of row i stand at `offsets[i]` to `offsets[i + 1]`.
    """

    order: np.ndarray
    starts: np.ndarray
    columns: np.ndarray
    sources: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, split: GraphSplit) -> Ordered:
        """The graph of a split, its nodes numbered by part."""
        row = np.empty_like(split.order)
        row[split.order] = np.arange(split.nodes)
        taken = in_edges(split.offsets, split.order)
        return cls(
            split.order,
            split.starts,
            split.edge_order[taken],
            row[split.sources[taken]],
            cumulated(np.diff(split.offsets)[split.order]),
        )

    @property
    def parts(self) -> int:
        """Parts that the rows are in."""
        return len(self.starts) - 1

    def rows(self, parts: Sequence[int]) -> np.ndarray:
        """Rows of some parts, in that order."""
        return np.concatenate([np.arange(self.starts[p], self.starts[p + 1]) for p in parts])

    def reads(self, rows: np.ndarray, hops: int) -> SubGraph:
        """Some rows and all that they read over `hops` layers: all in-edges of the nodes fewer than `hops` edges away.

        Nodes at `hops` edges have no in-edges here, so that what depends on these (their degree) is not theirs.
        """
        frontier, own = rows, len(rows)
        positions, counts = [], []
        for _ in range(hops):
            found = in_edges(self.offsets, frontier)
            positions.append(found)
            counts.append(self.offsets[frontier + 1] - self.offsets[frontier])
            frontier = np.setdiff1d(self.sources[found], rows)
            rows = np.concatenate([rows, frontier])
        counts.append(np.zeros(len(frontier), np.int64))
        every, taken = np.concatenate(counts), np.concatenate(positions)
        ascending = np.argsort(rows)
        sources = ascending[np.searchsorted(rows, self.sources[taken], sorter=ascending)]
        targets = np.repeat(np.arange(len(rows)), every)
        return SubGraph(rows, np.stack([sources, targets]), cumulated(every), taken, own)


class Batches:
    """Sub-graphs of some parts, edges from elsewhere left out.

    Edges inside a part and those between parts are kept in two lists, each sorted as the graph's are. A batch takes
    the first as slices, looks only through the second, which a good partition keeps short, and merges what it finds:

        inside     i0 i1    i2 i3 i4    ranks of b0 and b1, the edges inside that come before: 2 and 5
        between          b0          b1
    """

    def __init__(self, graph: Ordered) -> None:
        self.graph = graph
        part_of = np.repeat(np.arange(graph.parts), np.diff(graph.starts))
        targets = np.repeat(np.arange(len(graph.order)), np.diff(graph.offsets))
        origins = part_of[graph.sources]
        inside = origins == part_of[targets]
        self._inside, self._between = np.flatnonzero(inside), np.flatnonzero(~inside)
        self._rows, self._sources = np.arange(len(graph.order)), graph.sources[self._inside]
        self._inner_counts = np.bincount(targets[self._inside], minlength=len(graph.order))
        self._targets, self._origins = targets[self._between], origins[self._between]
        self._parts = part_of[self._targets]
        self._ranks = self._between - np.arange(len(self._between))
        first = graph.offsets[graph.starts]
        self._inside_starts, self._between_starts = (np.searchsorted(a, first) for a in (self._inside, self._between))

    def batch(self, parts: Sequence[int], positions: bool = True) -> SubGraph:
        """The nodes of some parts, ascending, and all edges among them, those between two of the parts included.

        Positions of edges cost a fifth of the time: state whether they are needed.
        """
        graph, chosen = self.graph, np.sort(parts)
        there = np.zeros(graph.parts, bool)
        there[chosen] = True
        own = cumulated(np.diff(graph.starts)[chosen])
        moved = np.zeros(graph.parts, np.int64)  # what is added to a row of a part
        moved[chosen] = own[:-1] - graph.starts[chosen]

        rows = joined(self._rows, graph.starts, chosen)
        counts = self._inner_counts[rows]
        sources = joined(self._sources, self._inside_starts, chosen)
        sizes = np.diff(self._inside_starts)[chosen]
        sources += np.repeat(moved[chosen], sizes)
        inside = joined(self._inside, self._inside_starts, chosen) if positions else self._inside[:0]

        between = np.concatenate([np.arange(self._between_starts[p], self._between_starts[p + 1]) for p in chosen])
        between = between[there[self._origins[between]]]
        if len(between):
            part, found = self._parts[between], self._between[between]
            first = np.zeros(graph.parts, np.int64)  # what is added to a rank, for the edges inside of other parts
            first[chosen] = cumulated(sizes)[:-1] - self._inside_starts[chosen]
            at = self._ranks[between] + first[part]
            sources = np.insert(sources, at, graph.sources[found] + moved[self._origins[between]])
            if positions:
                inside = np.insert(inside, at, found)
            counts += np.bincount(self._targets[between] + moved[part], minlength=len(rows))
        edges = np.stack([sources, np.repeat(np.arange(len(rows)), counts)])
        return SubGraph(rows, edges, cumulated(counts), inside, len(rows))


def joined(array: np.ndarray, starts: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The slices of some parts, one after the other."""
    return np.concatenate([array[starts[p] : starts[p + 1]] for p in parts])


def check_batch(size: int, parts: int) -> None:
    """Refuse batches of no parts, or of more than there are."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= parts:
        raise PartitionError(
            f"a batch takes 1 to {parts} parts, all that the graph is in; got parts_per_batch={size!r}; "
            "1 needs the least memory, more keep the edges between them"
        )


def grouped(shares: np.ndarray, most: float) -> list[list[int]]:
    """Consecutive parts that run at once: in each column of shares (parts, 2), a group adds up to at most `most`."""
    groups: list[list[int]] = []
    total = np.full(2, np.inf)
    for part, share in enumerate(shares):
        total = total + share
        if (total > most).any():
            groups.append([])
            total = share
        groups[-1].append(part)
    return groups
