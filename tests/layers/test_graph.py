"""Graphs by parts in PyTorch: batches, gradients, exact inference of torch_geometric's layers and plain ones, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranger_nn
from ranger_nn import GraphParts, InputError, PartitionError
from ranger_nn.errors import BudgetError
from ranger_nn.torch import GraphLoader, infer_by_parts

NODES = 120


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def graph() -> SimpleNamespace:
    """A directed graph with two edges twice, self-loops and a node without edges."""
    edges = torch.randint(0, NODES - 1, (2, 700))
    edges = torch.cat([edges, edges[:, :2], torch.tensor([[5, 7], [5, 7]])], 1)
    return SimpleNamespace(
        x=torch.randn(NODES, 6),
        y=torch.arange(NODES),
        train_mask=torch.rand(NODES) < 0.5,
        edge_index=edges,
        edge_weight=torch.rand(edges.shape[1]),
        name="a graph",
    )


class Plain(nn.Module):
    """A layer of our own: the weighted sum of sources, and a linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """(nodes, outputs)."""
        messages = self.linear(x)[edge_index[0]]
        messages = messages if edge_weight is None else messages * edge_weight[:, None]
        return messages.new_zeros(len(x), messages.shape[1]).index_add_(0, edge_index[1], messages)


class ByDegree(Plain):
    """Messages divided by the degree of their source: two hops."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """(nodes, outputs)."""
        degree = torch.bincount(edge_index[1], minlength=len(x)).clamp_min(1)
        return super().forward(x / degree[:, None], edge_index, edge_weight)


class Net(nn.Module):
    """What a user writes: residual connection, normalisation over all nodes, dropout."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.third = layer(6, 8), layer(8, 8), layer(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(nodes, 3)."""
        x = F.dropout(self.first(x, edge_index).relu(), 0.5, self.training)
        x = x + self.second((x - x.mean(0)) / (x.std(0) + 1), edge_index)
        return self.third(x, edge_index)


# ---------------------------------------------------------------------------- the loader


@pytest.mark.parametrize("parts_per_batch", [1, 3])
def test_loader_slices_everything(parts_per_batch: int) -> None:
    g = graph()
    loader = GraphLoader(g, GraphParts(7), parts_per_batch=parts_per_batch)
    seen = []
    for batch in loader:
        seen.append(batch.n_id)
        for name in ("x", "y", "train_mask"):
            assert torch.equal(getattr(batch, name), getattr(g, name)[batch.n_id])
        assert batch.name == "a graph" and batch.num_nodes == len(batch.n_id) == len(batch.offsets) - 1
        kept = torch.isin(g.edge_index, batch.n_id).all(0)
        ends = torch.cat([batch.n_id[batch.edge_index], batch.edge_weight[None]]).T.tolist()
        assert sorted(ends) == sorted(torch.cat([g.edge_index[:, kept], g.edge_weight[kept][None]]).T.tolist())
        assert torch.equal(torch.repeat_interleave(batch.offsets.diff()), batch.edge_index[1])
        assert (
            loader.split.part_of[batch.n_id] == np.repeat(batch.parts, np.bincount(loader.split.part_of)[batch.parts])
        ).all()
    assert len(seen) == len(loader) == -(-7 // parts_per_batch)
    assert torch.equal(torch.cat(seen).sort()[0], torch.arange(NODES))


def test_loader_shuffles_by_its_generator() -> None:
    g = graph()
    loaders = [GraphLoader(g, GraphParts(7), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    first, again = ([b.parts for b in loader for _ in [0]] for loader in loaders)
    assert first == again and sorted(first) == [[p] for p in range(7)]
    assert first != [b.parts for b in loaders[0]]
    assert [b.parts for b in GraphLoader(g, GraphParts(7), shuffle=False, parts=[5, 1])] == [[5], [1]]


def test_loader_takes_data_and_mappings() -> None:
    data_class = pytest.importorskip("torch_geometric.data").Data
    g = vars(graph()) | {"name": "a graph"}
    ours = GraphLoader(g, GraphParts(5), shuffle=False)
    theirs = GraphLoader(data_class(**g), GraphParts(5), shuffle=False)
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(b, data_class) and b.validate() and b.num_nodes == a.num_nodes
        for name in ("x", "y", "edge_index", "edge_weight", "n_id"):
            assert torch.equal(getattr(a, name), b[name])
        assert torch.equal(a.to("cpu").x, a.x)


@pytest.mark.parametrize("form", ["one part", "all parts in a batch"])
def test_gradient_of_one_batch_is_the_graphs(form: str) -> None:
    g, net = graph(), Net(Plain).eval()
    loader = GraphLoader(g, GraphParts(1 if form == "one part" else 5), parts_per_batch=1 if form == "one part" else 5)
    (batch,) = loader
    gradients = []
    for one in (g, batch):
        net.zero_grad()
        loss = F.mse_loss(net(one.x, one.edge_index)[one.train_mask].sum(1), one.y[one.train_mask].double())
        loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_training_by_parts_learns() -> None:
    torch.manual_seed(0)
    block = torch.arange(200) // 50
    near = torch.stack([torch.arange(200).repeat(6), torch.zeros(1200, dtype=torch.long)])
    near[1] = near[0] // 50 * 50 + torch.randint(0, 50, (1200,))
    net, x = nn.Sequential(Plain(200, 4)), torch.eye(200)
    adam = torch.optim.Adam(net.parameters(), 0.05)
    loader = GraphLoader({"x": x, "y": block, "edge_index": near}, GraphParts(8), parts_per_batch=2)
    for _ in range(10):
        for batch in loader:
            adam.zero_grad()
            F.cross_entropy(net[0](batch.x, batch.edge_index), batch.y).backward()
            adam.step()
    assert (infer_by_parts(net, x, near, loader.split).argmax(1) == block).double().mean() > 0.9


# ---------------------------------------------------------------------------- exact inference


def layers() -> dict[str, Callable[[int, int], nn.Module]]:
    """Layers of torch_geometric: one hop, normalised, several hops by construction."""
    g = pytest.importorskip("torch_geometric.nn")
    return {
        "gcn": g.GCNConv,
        "gcn improved, no normalisation of its own": lambda a, b: g.GCNConv(a, b, normalize=False),
        "sage": g.SAGEConv,
        "sage max": lambda a, b: g.SAGEConv(a, b, aggr="max"),
        "gat": lambda a, b: g.GATConv(a, b, heads=2, concat=False),
        "gin": lambda a, b: g.GINConv(nn.Linear(a, b)),
        "two hops of itself": lambda a, b: g.TAGConv(a, b, K=2),
        "degrees": g.ClusterGCNConv,
        "normalised, two hops": lambda a, b: g.SGConv(a, b, K=2),
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("memory", [None, "200kB"])
def test_inference_is_exact(name: str, memory: str | None) -> None:
    g, net = graph(), Net(layers()[name])
    expected = net.eval()(g.x, g.edge_index)
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = infer_by_parts(net, g.x, g.edge_index, GraphParts(6), memory=memory)
    assert not y.requires_grad and net.training and net.first.training
    assert "forward" not in net.first.__dict__
    torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layer", [Plain, ByDegree])
def test_inference_of_plain_layers_in_a_sequence(layer: type[Plain]) -> None:
    g, first, last = graph(), layer(6, 8), layer(8, 3)
    expected = last(first(g.x, g.edge_index, g.edge_weight).tanh(), g.edge_index, g.edge_weight)
    steps: list[Any] = [first, torch.tanh, lambda x, edges, edge_weight: last(x, edges, edge_weight)]
    for sequence in (steps, nn.Sequential(first, nn.Tanh(), last)):
        y = infer_by_parts(sequence, g.x, g.edge_index, GraphParts(6), edge_weight=g.edge_weight)
        torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-13)


def test_sums_are_the_same_to_the_last_bit() -> None:
    g = graph()
    net = Plain(6, 6)
    net.linear = nn.Identity()  # a matrix product may round by the number of its rows
    for dtype in (torch.float32, torch.float64):
        x = g.x.to(dtype)
        assert torch.equal(infer_by_parts(net, x, g.edge_index, GraphParts(9)), net(x, g.edge_index))


def test_one_hop_stated_for_a_layer_of_two_is_wrong() -> None:
    g, net = graph(), ByDegree(6, 3)
    y = infer_by_parts(net, g.x, g.edge_index, GraphParts(6), hops=1)
    assert (y - net(g.x, g.edge_index)).abs().max() > 1e-3


def test_what_reads_everything_runs_whole() -> None:
    class Centred(Plain):
        def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
            return super().forward(x - x.mean(0), edge_index)

    class Pair(Plain):
        def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Any:
            return super().forward(x, edge_index), edge_index

    g = graph()
    g.x = g.x + torch.arange(NODES)[:, None]
    centred, pair = Centred(6, 3), Pair(6, 3)
    with pytest.warns(UserWarning, match=r"Centred on the whole graph: its results change with the halo, up to 4 hops"):
        assert torch.equal(infer_by_parts(centred, g.x, g.edge_index, GraphParts(40)), centred(g.x, g.edge_index))
    with pytest.warns(UserWarning, match=r"Pair on the whole graph: its result is not one tensor over nodes"):
        assert torch.equal(infer_by_parts(pair, g.x, g.edge_index, GraphParts(4))[0], pair(g.x, g.edge_index)[0])


def test_memory_is_kept() -> None:
    nodes, edges = 2000, torch.randint(0, 2000, (2, 40000))
    net, x = Plain(32, 32), torch.randn(2000, 32)
    part = torch.arange(nodes) % 20

    def peak(memory: int | None) -> int:
        with ranger_nn.measure("cpu") as used:
            used.leave_out(infer_by_parts(net, x, edges, part, memory=memory, hops=1))
        return used.peak

    expected, one = net(x, edges), peak(None)
    given = x.nbytes  # the result while it is filled
    for memory in (2_500_000, 6_000_000):
        assert peak(memory) - given <= memory
        y = infer_by_parts(net, x, edges, part, memory=memory, hops=1)
        torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-13)
    assert peak(6_000_000) > one  # several parts at once
    with pytest.raises(BudgetError, match=r"the largest of 20 parts takes .* memory=100 kB is allowed; .* more parts"):
        infer_by_parts(net, x, edges, part, memory="100kB")


# ---------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda g: GraphLoader({"x": g.x}, GraphParts(2)), InputError, r"edge_index, an integer tensor.*NoneType beside x"),
        (lambda g: GraphLoader({"edge_index": g.edge_index}, GraphParts(2)), InputError, r"num_nodes; got neither"),
        (lambda g: GraphLoader(g, GraphParts(121)), PartitionError, r"121 parts were asked for, and the graph has 120"),
        (lambda g: GraphLoader(g, GraphParts(3), parts_per_batch=4), PartitionError, r"1 to 3 parts.*parts_per_batch=4"),
        (lambda g: GraphLoader(g, GraphParts(3), parts=[0, 3]), PartitionError, r"some of 0 to 2, each once; got \[0, 3\]"),
        (lambda g: GraphLoader(g, GraphParts(3), parts=[1, 1]), PartitionError, r"each once; got \[1, 1\]"),
        (lambda g: GraphLoader(g, torch.zeros(5, dtype=torch.long)), InputError, r"nodes 0 to 4; node \d+ is out"),
        (lambda g: infer_by_parts([torch.relu], g.x, g.edge_index, GraphParts(2)), InputError, r"none of relu has one"),
        (lambda g: infer_by_parts(Plain(6, 2), g.x, g.edge_index.T, GraphParts(2)), InputError, r"shape \(704, 2\)"),
        (lambda g: infer_by_parts(Plain(6, 2), g.x, g.edge_index, GraphParts(2), hops=0), InputError, r"from 1; got 0"),
    ],
)  # fmt: skip
def test_refused(call: Callable[[Any], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call(graph())
