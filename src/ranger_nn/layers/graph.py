"""Sub-graphs of a graph in parts: the batch of some parts, and what a part reads. NumPy, no framework.

Nodes are numbered anew, part by part, once. A part is then a slice of the rows of every array over nodes, and its
in-edges are a slice of the edges, which are sorted by target (those of one target in the order given, so that sums
over in-edges keep their order to the last bit):

    rows       | part 0      | part 1    | part 2        |        starts  0       6     11         18
    edges      | in-edges of 0  | in-edges of 1  | of 2  |        offsets[row] : offsets[row + 1]

`Ordered.batch` joins the slices of some parts and drops the edges that come from elsewhere: work in proportion to the
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
        positions: (edges,) where each edge stands in the ordered graph.
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
        origins: (edges,) the part from which each edge comes.
    """

    order: np.ndarray
    starts: np.ndarray
    columns: np.ndarray
    sources: np.ndarray
    offsets: np.ndarray
    origins: np.ndarray

    @classmethod
    def of(cls, split: GraphSplit) -> Ordered:
        """The graph of a split, its nodes numbered by part."""
        row = np.empty_like(split.order)
        row[split.order] = np.arange(split.nodes)
        taken = in_edges(split.offsets, split.order)
        sources = split.sources[taken]
        return cls(
            split.order,
            split.starts,
            split.edge_order[taken],
            row[sources],
            cumulated(np.diff(split.offsets)[split.order]),
            split.part_of[sources],
        )

    @property
    def parts(self) -> int:
        """Parts that the rows are in."""
        return len(self.starts) - 1

    def batch(self, parts: Sequence[int]) -> SubGraph:
        """The nodes of some parts, in that order, and all edges among them, those between two of the parts included."""
        sizes = np.diff(self.starts)[list(parts)]
        first = cumulated(sizes)[:-1]
        moved = np.zeros(self.parts, np.int64)
        moved[list(parts)] = first - self.starts[list(parts)]
        there = np.zeros(self.parts, bool)
        there[list(parts)] = True
        sources, targets, positions, offsets = [], [], [], [np.zeros(1, np.int64)]
        total = 0
        for part, start in zip(parts, first):
            a, b = self.starts[part], self.starts[part + 1]
            edges = slice(self.offsets[a], self.offsets[b])
            origins = self.origins[edges]
            kept = np.flatnonzero(there[origins])
            counts = np.diff(np.searchsorted(kept, self.offsets[a : b + 1] - self.offsets[a]))
            sources.append(self.sources[edges][kept] + moved[origins[kept]])
            targets.append(np.repeat(np.arange(start, start + b - a), counts))
            positions.append(kept + self.offsets[a])
            offsets.append(np.cumsum(counts) + total)
            total += len(kept)
        return SubGraph(
            self.rows(parts),
            np.stack([np.concatenate(sources), np.concatenate(targets)]),
            np.concatenate(offsets),
            np.concatenate(positions),
            int(sizes.sum()),
        )

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
