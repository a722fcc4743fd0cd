"""Graph parts: each node in one part, halos by definition, batches against masks over all edges, refusals."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranger_nn import GraphParts, InputError, MissingExtraError, PartitionError
from ranger_nn.layers.graph import Batches, Ordered, check_batch, grouped
from ranger_nn.partition.graph import GraphSplit, as_split


@st.composite
def graphs(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Directed multigraphs with at least one edge between two nodes; self-loops and isolated nodes occur."""
    nodes = draw(st.integers(2, 24))
    ends = st.integers(0, nodes - 1)
    pairs = draw(st.lists(st.tuples(ends, ends), max_size=60))
    a = draw(ends)
    pairs.append((a, (a + draw(st.integers(1, nodes - 1))) % nodes))
    return np.array(pairs, np.int64).T, nodes


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, int, GraphSplit]:
    """Graphs and any assignment, not METIS's alone."""
    edges, nodes = draw(graphs())
    part = np.array(draw(st.lists(st.integers(0, 5), min_size=nodes, max_size=nodes)))
    return edges, nodes, GraphSplit.of(np.unique(part, return_inverse=True)[1], edges)


def reached(edges: np.ndarray, own: np.ndarray, hops: int) -> np.ndarray:
    """The halo, edge by edge."""
    inside = set(own.tolist())
    for _ in range(hops):
        inside |= {int(s) for s, t in edges.T if int(t) in inside}
    return np.array(sorted(inside - set(own.tolist())), np.int64)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_each_node_in_one_part(graph: tuple[np.ndarray, int], data: st.DataObject) -> None:
    edges, nodes = graph
    parts = data.draw(st.integers(1, nodes))
    split = GraphParts(parts, seed=data.draw(st.integers(0, 3))).split(edges, nodes)
    assert split.parts == parts and split.nodes == nodes
    owned = np.concatenate([split.own(p) for p in range(parts)])
    assert (np.sort(owned) == np.arange(nodes)).all() and (owned == split.order).all()
    for p in range(parts):
        assert len(split.own(p)) and (split.part_of[split.own(p)] == p).all()


@given(splits(), st.integers(0, 3))
def test_halo_is_what_reaches_a_part(found: tuple[np.ndarray, int, GraphSplit], hops: int) -> None:
    edges, _, split = found
    for p in range(split.parts):
        np.testing.assert_array_equal(split.halo_of(p, hops), reached(edges, split.own(p), hops))
        outside = edges[0][(split.part_of[edges[1]] == p) & (split.part_of[edges[0]] != p)]
        np.testing.assert_array_equal(split.halo_of(p), np.unique(outside))
    assert split.cut == (split.part_of[edges[0]] != split.part_of[edges[1]]).sum()


@given(splits(), st.data())
def test_batch_keeps_the_edges_among_its_nodes(found: tuple[np.ndarray, int, GraphSplit], data: st.DataObject) -> None:
    edges, nodes, split = found
    chosen = data.draw(st.lists(st.integers(0, split.parts - 1), min_size=1, unique=True))
    ordered = Ordered.of(split)
    batch = Batches(ordered).batch(chosen)
    given_nodes = ordered.order[batch.rows]
    assert (np.sort(given_nodes) == np.flatnonzero(np.isin(split.part_of, chosen))).all() and batch.own == len(
        batch.rows
    )
    kept = np.flatnonzero(np.isin(split.part_of[edges], chosen).all(0))
    number = np.full(nodes, -1)
    number[given_nodes] = np.arange(batch.own)
    expected = kept[np.argsort(number[edges[1, kept]], kind="stable")]  # of one target, in the order given
    np.testing.assert_array_equal(ordered.columns[batch.positions], expected)
    np.testing.assert_array_equal(batch.edges, number[edges[:, expected]])
    np.testing.assert_array_equal(np.repeat(np.arange(batch.own), np.diff(batch.offsets)), batch.edges[1])
    np.testing.assert_array_equal(Batches(ordered).batch(chosen, positions=False).edges, batch.edges)


@given(splits(), st.integers(1, 3), st.data())
def test_reads_have_all_in_edges(found: tuple[np.ndarray, int, GraphSplit], hops: int, data: st.DataObject) -> None:
    edges, _, split = found
    ordered = Ordered.of(split)
    parts = data.draw(st.lists(st.integers(0, split.parts - 1), min_size=1, unique=True))
    part = ordered.reads(ordered.rows(parts), hops)
    given_nodes = ordered.order[part.rows]
    own = np.flatnonzero(np.isin(split.part_of, parts))
    np.testing.assert_array_equal(np.sort(given_nodes[: part.own]), own)
    np.testing.assert_array_equal(np.sort(given_nodes[part.own :]), reached(edges, own, hops))
    fed = np.union1d(own, reached(edges, own, hops - 1))
    for i, node in enumerate(given_nodes):
        columns = np.flatnonzero(edges[1] == node) if node in fed else np.empty(0, int)
        at = slice(part.offsets[i], part.offsets[i + 1])
        np.testing.assert_array_equal(ordered.columns[part.positions[at]], columns)
        np.testing.assert_array_equal(given_nodes[part.edges[0, at]], edges[0, columns])
        assert (part.edges[1, at] == i).all()


@given(splits(), st.integers(0, 99))
def test_round_trip(found: tuple[np.ndarray, int, GraphSplit], seed: int) -> None:
    edges, nodes, split = found
    ordered, x = Ordered.of(split), np.random.default_rng(seed).normal(size=nodes)
    back = np.empty(nodes)
    back[ordered.order] = x[ordered.order]
    np.testing.assert_array_equal(back, x)
    targets = np.repeat(np.arange(nodes), np.diff(ordered.offsets))
    np.testing.assert_array_equal(ordered.order[np.stack([ordered.sources, targets])], edges[:, ordered.columns])


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=20), st.floats(1, 5))
def test_groups_fit(shares: list[tuple[float, float]], most: float) -> None:
    groups = grouped(np.array(shares), most)
    assert [p for g in groups for p in g] == list(range(len(shares)))
    assert all(np.array(shares)[g].sum(0).max() <= most + 1e-9 for g in groups)


def test_metis_finds_the_blocks_and_keeps_them() -> None:
    rng, block = np.random.default_rng(0), np.repeat(np.arange(8), 50)
    near = np.stack([np.arange(400).repeat(6), 0 * np.arange(2400)])
    near[1] = near[0] // 50 * 50 + rng.integers(0, 50, 2400)
    far = rng.integers(0, 400, (2, 60))
    edges = np.concatenate([near, far], 1)
    split = GraphParts(8).split(edges, 400)
    assert split.cut <= 60 and np.bincount(split.part_of).tolist() == [50] * 8
    assert all(len(np.unique(block[split.own(p)])) == 1 for p in range(8))
    assert (GraphParts(8).split(edges, 400).part_of == split.part_of).all()
    loops = np.concatenate([edges, np.tile(np.arange(400), (2, 1))], 1)
    assert (GraphParts(8).split(loops, 400).part_of == split.part_of).all()


def test_what_describes_a_split() -> None:
    edges, part = np.array([[0, 1, 2], [1, 2, 3]]), [0, 0, 1, 1]
    split = GraphSplit.of(part, edges)
    assert as_split(split, edges, 4) is split
    for one in (np.array(part), part, lambda e, n: np.arange(n) // 2):
        assert as_split(one, edges, 4).part_of.tolist() == part
    with pytest.raises(PartitionError, match=r"4 nodes and 3 edges, the graph 5 nodes and 3 edges"):
        as_split(split, edges, 5)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: GraphParts(0), PartitionError, r"parts of GraphParts must be positive integers; got 0"),
        (lambda: GraphParts(2, halo=-1), PartitionError, r"halo of GraphParts is an integer, 0 or more; got -1"),
        (lambda: GraphParts(2, seed=1.5), PartitionError, r"seed of GraphParts .* got 1.5"),
        (lambda: GraphParts(5).split([[0], [1]], 4), PartitionError, r"5 parts were asked for, and the graph has 4"),
        (lambda: GraphParts(2).split(np.zeros((2, 0), int), 4), PartitionError, r"4 nodes and 0 edges has none"),
        (lambda: GraphParts(2).split([[1, 2], [1, 2]], 4), PartitionError, r"4 nodes and 2 edges has none"),
        (lambda: GraphParts(2).split([[0], [4]], 4), InputError, r"nodes 0 to 3; node 4 is out of range"),
        (lambda: GraphParts(2).split([[0], [-1]], 4), InputError, r"node -1 is out of range"),
        (lambda: GraphParts(2).split([[0, 1], [1, 2], [2, 3]], 4), InputError, r"got shape \(3, 2\).*\.T"),
        (lambda: GraphParts(2).split([[0.0], [1.0]], 4), InputError, r"edges are integers.*float64"),
        (lambda: GraphParts(1).split([[0], [1]], 0), PartitionError, r"nodes of a graph must be positive .* got 0"),
        (lambda: GraphSplit.of([0, 2], [[0], [1]]), PartitionError, r"part 1 of 3 owns none"),
        (lambda: GraphSplit.of([0, -1], [[0], [1]]), PartitionError, r"parts from 0; got .*least value -1"),
        (lambda: GraphSplit.of([[0, 1]], [[0], [1]]), PartitionError, r"got shape \(1, 2\)"),
        (lambda: check_batch(4, 3), PartitionError, r"1 to 3 parts.*got parts_per_batch=4"),
    ],
)
def test_refused(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_missing_pymetis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(MissingExtraError, match=r'pip install "ranger-nn\[graph\]"'):
        GraphParts(2).split([[0, 1], [1, 2]], 3)
