"""`GraphParts`: the nodes of a graph in parts that few edges cross, and around each part its halo.

Edges are columns (source, target), as in torch_geometric: a node takes messages along its in-edges. Part 0 below owns
a, b, c; its halo of one hop is exactly what one message-passing layer reads from outside, the sources of its in-edges:

       part 0   |   part 1              d -> c is an in-edge of part 0:  d is in the halo
     a -- b     |                       b -> e is an in-edge of part 1:  b is in the halo of part 1, but e is in no halo
      \\   \\-----|---> e -- f
       c <------|--- d --/              two hops would add what d itself reads: f

METIS (Karypis and Kumar 1998, multilevel k-way partitioning), through pymetis, takes undirected graphs: for the cut
alone, edges count in both directions and those between the same two nodes are added up. Nodes without edges are dealt
out too. METIS may leave a part empty where parts are nearly as many as nodes; such a part is given a node of the
largest. Enter at `GraphParts.split`, or at `GraphSplit.of` for an assignment that comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ranger_nn.core.region import positive
from ranger_nn.errors import InputError, MissingExtraError, PartitionError

INT32 = np.iinfo(np.int32).max  # METIS is built with 32-bit indices


@dataclass(frozen=True, eq=False)
class GraphSplit:
    """A graph cut in parts. Arrays are NumPy, int64.

    Attributes:
        part_of: (nodes,) the part that owns each node, from 0.
        order: (nodes,) all nodes, part by part, and within a part by number.
        starts: (parts + 1,) part p owns `order[starts[p]:starts[p + 1]]`.
        edge_order: (edges,) the columns of `edges` sorted by target; those of one target in the order given.
        sources: (edges,) the source of each edge in that order.
        offsets: (nodes + 1,) the in-edges of node i are `edge_order[offsets[i]:offsets[i + 1]]`.
        halo: hops of the halo.
    """

    part_of: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    edge_order: np.ndarray
    sources: np.ndarray
    offsets: np.ndarray
    halo: int = 1

    @classmethod
    def of(cls, part_of: Any, edges: Any, halo: int = 1) -> GraphSplit:
        """The split in which node i belongs to part `part_of[i]`; parts are numbered from 0, and none is empty.

        Raises:
            PartitionError: `part_of` is not an integer array (nodes,), or a part is empty.
            InputError: edges of a wrong shape or type, or out of range.
        """
        part = np.asarray(part_of)
        if part.ndim != 1 or not np.issubdtype(part.dtype, np.integer) or not part.size or part.min() < 0:
            raise PartitionError(
                "an assignment of nodes to parts is an integer array (nodes,) of parts from 0; got shape "
                f"{part.shape}, {part.dtype}{f', least value {part.min()}' if part.size else ''}"
            )
        sizes = np.bincount(part)
        if not sizes.all():
            raise PartitionError(
                f"each part owns at least one node: part {int(np.argmin(sizes))} of {len(sizes)} owns none; number "
                "the parts without gaps, for example by numpy.unique(part_of, return_inverse=True)[1]"
            )
        found = checked(edges, len(part))
        edge_order = np.argsort(found[1], kind="stable")
        return cls(
            part.astype(np.int64),
            np.argsort(part, kind="stable"),
            cumulated(sizes),
            edge_order,
            found[0, edge_order],
            cumulated(np.bincount(found[1], minlength=len(part))),
            halo,
        )

    @property
    def nodes(self) -> int:
        """Nodes of the graph."""
        return len(self.part_of)

    @property
    def parts(self) -> int:
        """Parts that the nodes are in."""
        return len(self.starts) - 1

    def own(self, part: int) -> np.ndarray:
        """Nodes that a part owns, ascending."""
        return self.order[self.starts[part] : self.starts[part + 1]]

    def halo_of(self, part: int, hops: int | None = None) -> np.ndarray:
        """Nodes outside a part from which it is reached in at most `hops` edges (`halo` of them by default), ascending."""
        inside = frontier = self.own(part)
        found: list[np.ndarray] = [np.empty(0, np.int64)]
        for _ in range(self.halo if hops is None else hops):
            frontier = np.setdiff1d(self.sources[in_edges(self.offsets, frontier)], inside)
            inside = np.union1d(inside, frontier)
            found.append(frontier)
        return np.sort(np.concatenate(found))

    @property
    def cut(self) -> int:
        """Edges between parts."""
        targets = np.repeat(self.part_of, np.diff(self.offsets))
        return int((self.part_of[self.sources] != targets).sum())


@dataclass(frozen=True)
class GraphParts:
    """A graph's nodes in `parts` parts of nearly equal size that few edges cross: METIS.

    Args:
        parts: how many parts.
        halo: hops of the halo: 1 is what one message-passing layer reads.
        seed: of METIS; the same seed gives the same parts.

    Raises:
        PartitionError: `parts` below 1, `halo` or `seed` below 0.
    """

    parts: int
    halo: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no number of parts or hops."""
        positive("parts of GraphParts", [self.parts])
        for name, value in (("halo", self.halo), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise PartitionError(f"{name} of GraphParts is an integer, 0 or more; got {value!r}")

    def split(self, edges: Any, nodes: int) -> GraphSplit:
        """Cut the graph.

        Args:
            edges: integers (2, edges), each column source -> target; NumPy, or what `numpy.asarray` takes.
            nodes: nodes of the graph, numbered from 0.

        Raises:
            InputError: edges of a wrong shape or type, or out of range.
            PartitionError: more parts than nodes, no edge between two nodes.
            MissingExtraError: pymetis or scipy is not installed.
        """
        positive("nodes of a graph", [nodes])
        found = checked(edges, nodes)
        if self.parts > nodes:
            raise PartitionError(
                f"each part owns at least one node: {self.parts} parts were asked for, and the graph has {nodes} "
                f"nodes; ask for at most {nodes}"
            )
        if not (found[0] != found[1]).any():
            raise PartitionError(
                f"GraphParts follows the edges between nodes, and this graph of {nodes} nodes and {found.shape[1]} "
                "edges has none; take any assignment, for example GraphSplit.of(numpy.arange(nodes) % parts, edges)"
            )
        return GraphSplit.of(filled(self._metis(found, nodes), self.parts), found, self.halo)

    def _metis(self, edges: np.ndarray, nodes: int) -> np.ndarray:
        """The part of each node; some parts may be empty."""
        try:
            import pymetis
            from scipy.sparse import csr_array
        except ImportError as error:
            raise MissingExtraError('GraphParts needs pymetis and scipy: pip install "ranger-nn[graph]"') from error
        if self.parts == 1:
            return np.zeros(nodes, np.int64)
        source, target = edges[:, edges[0] != edges[1]]
        ones = np.ones(2 * len(source), np.int32)
        both = np.concatenate([source, target]), np.concatenate([target, source])
        matrix = csr_array((ones, both), shape=(nodes, nodes))
        matrix.sum_duplicates()
        if matrix.nnz > INT32:
            raise PartitionError(
                f"METIS counts in 32 bits, at most {INT32} entries; this graph has {matrix.nnz} of them, both "
                "directions counted; give GraphSplit.of an assignment from a partitioner with 64 bits"
            )
        alike = (matrix.data == matrix.data[0]).all()
        _, part = pymetis.part_graph(
            self.parts,
            pymetis.CSRAdjacency(matrix.indptr.astype(np.int32), matrix.indices.astype(np.int32)),
            eweights=None if alike else matrix.data,
            options=pymetis.Options(seed=self.seed),
        )
        return np.asarray(part, np.int64)


Partitioning = GraphParts | GraphSplit | Callable[[np.ndarray, int], Any] | Any


def as_split(partition: Partitioning, edges: Any, nodes: int) -> GraphSplit:
    """A split from whatever describes one: `GraphParts`, a split, an assignment (nodes,), or a callable that gives one.

    Raises:
        PartitionError: the split is of another graph.
    """
    if isinstance(partition, GraphParts):
        return partition.split(edges, nodes)
    if not isinstance(partition, GraphSplit):
        partition = GraphSplit.of(partition(edges, nodes) if callable(partition) else partition, edges)
    count = np.shape(edges)[-1]
    if (partition.nodes, len(partition.sources)) != (nodes, count):
        raise PartitionError(
            f"a split belongs to one graph: this one has {partition.nodes} nodes and {len(partition.sources)} edges, "
            f"the graph {nodes} nodes and {count} edges; split the graph anew"
        )
    return partition


def checked(edges: Any, nodes: int) -> np.ndarray:
    """Edges as int64 (2, edges).

    Raises:
        InputError: a wrong shape or type, or nodes out of range.
    """
    found = np.asarray(edges)
    if found.ndim != 2 or len(found) != 2:
        raise InputError(
            f"edges are an array (2, edges), each column source -> target; got shape {found.shape}; a list of pairs "
            "is numpy.asarray(pairs).T"
        )
    if not np.issubdtype(found.dtype, np.integer):
        raise InputError(f"edges are integers, the numbers of nodes; got {found.dtype}; convert with astype('int64')")
    if found.size and (found.min() < 0 or found.max() >= nodes):
        wrong = found[(found < 0) | (found >= nodes)][0]
        raise InputError(
            f"edges join nodes 0 to {nodes - 1}; node {wrong} is out of range; number the nodes from 0, or state "
            "how many there are"
        )
    return found.astype(np.int64, copy=False)


def filled(part: np.ndarray, parts: int) -> np.ndarray:
    """The assignment in which each empty part has taken the last node of the part that is then the largest."""
    sizes = np.bincount(part, minlength=parts)
    for empty in np.flatnonzero(sizes == 0):
        largest = int(np.argmax(sizes))
        part[np.flatnonzero(part == largest)[-1]] = empty
        sizes[largest] -= 1
        sizes[empty] = 1
    return part


def cumulated(counts: np.ndarray) -> np.ndarray:
    """0 and the running sums, int64."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def in_edges(offsets: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Positions, in an array sorted by target, of the in-edges of these nodes, node by node."""
    counts = offsets[nodes + 1] - offsets[nodes]
    first = np.repeat(offsets[nodes] - cumulated(counts)[:-1], counts)
    return first + np.arange(len(first))
