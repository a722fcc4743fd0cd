"""Training a GCN by parts (Cluster-GCN, `GraphLoader`) beside the whole graph at once, and exact inference by parts.

python -m benchmarks.graph_training

The graph is a block model: nodes in communities of uneven sizes, most edges inside a community, both directions of each
edge kept, a self-loop at each node; a community has one of ten classes, features are noise around a mean per class.
The network is Kipf and Welling's (2017): three layers, 64 -> 128 -> 128 -> 10, ReLU, Adam. An epoch uses each training
node once: one step on the whole graph, or one step for each batch of parts. Ratios are to the same epoch on the whole
graph, interleaved in one run, for two programs:

    CSR     A @ X by PyTorch's sparse CSR kernel, with the narrower product first and A (symmetric) as its own transpose
    PyG     torch_geometric's GCNConv on edge_index
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranger_nn
from benchmarks.common import interleaved, judged, line, megabytes
from ranger_nn import GraphParts
from ranger_nn.torch import GraphLoader, infer_by_parts

FEATURES, HIDDEN, CLASSES = 64, 128, 10
PEAK_TARGET, TIME_TARGET, POINT = 1 / 4, 1 / 2, 0.01


@dataclass
class Graph:
    """Tensors of the block model: x (nodes, 64), y (nodes,), edge_index (2, edges), train_mask (nodes,)."""

    x: Tensor
    y: Tensor
    edge_index: Tensor
    train_mask: Tensor


def block_model(nodes: int, edges: int, communities: int, inside: float, seed: int = 0) -> Graph:
    """`edges` undirected edges, the share `inside` of them within a community; half of the nodes train."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(communities, 5.0))
    community = np.sort(rng.choice(communities, nodes, p=shares))
    sizes = np.bincount(community, minlength=communities)
    starts = np.cumsum(sizes) - sizes
    a = rng.integers(0, nodes, edges)
    near = starts[community[a]] + (rng.random(edges) * sizes[community[a]]).astype(np.int64)
    b = np.where(rng.random(edges) < inside, near, rng.integers(0, nodes, edges))
    shuffled = rng.permutation(nodes)
    a, b, loops = shuffled[a], shuffled[b], np.arange(nodes)
    y = np.empty(nodes, np.int64)
    y[shuffled] = (community % CLASSES + (rng.random(nodes) < 0.1) * rng.integers(0, CLASSES, nodes)) % CLASSES
    means = rng.normal(size=(CLASSES, FEATURES)) * 0.2
    x = (means[y] + rng.normal(size=(nodes, FEATURES))).astype(np.float32)
    edge_index = np.stack([np.concatenate([a, b, loops]), np.concatenate([b, a, loops])])
    return Graph(*(torch.from_numpy(t) for t in (x, y, edge_index, rng.random(nodes) < 0.5)))


# ---------------------------------------------------------------------------- the network, on CSR


class Propagate(torch.autograd.Function):
    """A @ x for a symmetric CSR matrix, so that the backward is the same product."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        """(nodes, features)."""
        ctx.matrix = matrix
        return torch.sparse.mm(matrix, x, "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        """The transpose is the matrix."""
        return None, torch.sparse.mm(ctx.matrix, grad.contiguous(), "sum")


class CsrGCN(nn.Module):
    """Three graph convolutions on a normalised CSR matrix."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (FEATURES, HIDDEN, HIDDEN, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        """(nodes, classes)."""
        for layer in self.layers:
            if layer.in_features <= layer.out_features:
                x = layer(Propagate.apply(matrix, x))
            else:
                x = Propagate.apply(matrix, F.linear(x, layer.weight)) + layer.bias
            if layer is not self.layers[-1]:
                x = F.relu(x, inplace=True)
        return x


class EdgeLayer(nn.Module):
    """A layer of `CsrGCN` on edges and weights, as `infer_by_parts` takes it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """(nodes, features); edges are sorted by target or not."""
        first = self.linear.in_features <= self.linear.out_features
        x = x if first else F.linear(x, self.linear.weight)
        order = torch.argsort(edge_index[1], stable=True)
        offsets = F.pad(torch.bincount(edge_index[1], minlength=len(x)).cumsum(0), (1, 0))
        x = torch.sparse.mm(csr(offsets, edge_index[0, order], edge_weight[order]), x, "sum")
        return self.linear(x) if first else x + self.linear.bias


def csr(offsets: Tensor, sources: Tensor, weights: Tensor) -> Tensor:
    """The matrix (targets, sources) of edges that are sorted by target."""
    n = len(offsets) - 1
    return torch.sparse_csr_tensor(offsets, sources, weights, (n, n), check_invariants=False)


def normalised(edge_index: Tensor, offsets: Tensor) -> Tensor:
    """Weights of edges sorted by target: D^-1/2 A D^-1/2, self-loops being edges of A."""
    scale = offsets.diff().to(torch.float32).rsqrt_()
    return scale[edge_index[0]] * scale[edge_index[1]]


def adjacency(batch: Any) -> Tensor:
    """The normalised matrix of a batch."""
    return csr(batch.offsets, batch.edge_index[0], normalised(batch.edge_index, batch.offsets))


class PyGGCN(nn.Module):
    """The same network of torch_geometric's layers."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        sizes = (FEATURES, HIDDEN, HIDDEN, CLASSES)
        self.layers = nn.ModuleList(GCNConv(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(nodes, classes)."""
        for layer in self.layers:
            x = layer(x, edge_index)
            if layer is not self.layers[-1]:
                x = F.relu(x, inplace=True)
        return x


# ---------------------------------------------------------------------------- training


class Training:
    """A network, its optimiser, and what a step on a graph or a batch is."""

    def __init__(self, network: nn.Module, structure: Callable[[Any], Tensor]) -> None:
        self.network, self.structure = network, structure
        self.adam = torch.optim.Adam(network.parameters(), 0.01, fused=True)

    def step(self, batch: Any) -> None:
        """One step on the training nodes of a batch."""
        self.adam.zero_grad()
        y = self.network(batch.x, self.structure(batch))
        F.cross_entropy(y[batch.train_mask], batch.y[batch.train_mask]).backward()
        self.adam.step()

    def epoch(self, batches: Any) -> Callable[[], tuple[Tensor, ...]]:
        """A step for each batch."""

        def work() -> tuple[Tensor, ...]:
            for batch in batches:
                self.step(batch)
            return ()

        return work


def peak(work: Callable[[], Any]) -> int:
    """Most bytes live at one time in an epoch, beside the graph, the loader, the network and the optimiser's state."""
    work()
    with ranger_nn.measure("cpu") as used:
        work()
    return used.peak


def accuracy(logits: Tensor, graph: Graph) -> float:
    """Share of test nodes classified right."""
    test = ~graph.train_mask
    return (logits[test].argmax(1) == graph.y[test]).float().mean().item()


def rows(graph: Graph, loader: GraphLoader, whole: Any, repeats: int) -> None:
    """Peak and time of an epoch, four ways."""
    matrix = adjacency(whole)
    ways = {
        "CSR, whole graph": Training(CsrGCN(), lambda batch: matrix).epoch([graph]),
        "CSR, by parts": Training(CsrGCN(), adjacency).epoch(loader),
        "PyG, whole graph": Training(PyGGCN(), lambda batch: batch.edge_index).epoch([graph]),
        "PyG, by parts": Training(PyGGCN(), lambda batch: batch.edge_index).epoch(loader),
    }
    peaks = {name: peak(work) for name, work in ways.items()}
    kinds = [[n for n in ways if n.startswith(kind)] for kind in ("CSR", "PyG")]
    seconds = interleaved({n: ways[n] for n in kinds[0]}, repeats)
    seconds |= interleaved({n: ways[n] for n in kinds[1]}, 1)  # seconds each, and warm from the count of the peak
    print(
        line(
            [
                "epoch",
                "peak MB",
                "seconds",
                "peak / whole CSR",
                "time / whole CSR",
                "peak / whole PyG",
                "time / whole PyG",
            ]
        )
    )
    print(line(["---"] * 7))
    for name in ways:
        cells = [name, megabytes(peaks[name]), f"{seconds[name]:.3f}"]
        for other in ("CSR, whole graph", "PyG, whole graph"):
            aimed = "parts" in name and (other[:3] == name[:3] or name.startswith("CSR"))
            for value, target in ((peaks, PEAK_TARGET), (seconds, TIME_TARGET)):
                cells.append(judged(value[name] / value[other], target if aimed else None, "{:.3f}"))
        print(line(cells), flush=True)


def quality(graph: Graph, loader: GraphLoader, whole: Any, steps: int) -> CsrGCN:
    """Test accuracy after equal steps of both, from the same start; the network trained by parts."""
    matrix = adjacency(whole)
    torch.manual_seed(1)
    full, parts = CsrGCN(), CsrGCN()
    parts.load_state_dict(full.state_dict())
    found = {}
    for name, network in (("whole graph", full), ("by parts", parts)):
        training = Training(network, (lambda batch: matrix) if network is full else adjacency)
        start, done = time.perf_counter(), 0
        while done < steps:
            for batch in [graph] if network is full else loader:
                training.step(batch)
                done += 1
                if done == steps:
                    break
        taken = time.perf_counter() - start
        with torch.no_grad():
            found[name] = accuracy(network(graph.x, matrix), graph)
        epochs = steps if network is full else steps / len(loader)
        print(f"{name}: {steps} steps are {epochs:g} epochs, {taken:.1f} s, test accuracy {found[name]:.2%}")
    lost = found["whole graph"] - found["by parts"]
    print(f"accuracy lost by parts after equal steps: {judged(100 * lost, 100 * POINT, '{:.2f}')} points")
    return parts


def inference(graph: Graph, loader: GraphLoader, whole: Any, network: CsrGCN) -> None:
    """Exact inference by parts: difference to the whole graph, and both costs."""
    weights = torch.empty(graph.edge_index.shape[1])
    order = torch.argsort(graph.edge_index[1], stable=True)
    weights[order] = normalised(whole.edge_index, whole.offsets)
    csr_layers: list[Any] = []
    for layer in network.layers:
        csr_layers += [EdgeLayer(layer), F.relu]
    csr_layers.pop()
    torch.manual_seed(0)
    pyg = PyGGCN()

    def whole_csr() -> Tensor:
        x = graph.x
        for step in csr_layers:
            x = step(x, graph.edge_index, weights) if isinstance(step, EdgeLayer) else step(x)
        return x

    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "CSR": (
            whole_csr,
            lambda: infer_by_parts(csr_layers, graph.x, graph.edge_index, loader.split, edge_weight=weights, hops=1),
        ),
        "PyG": (
            lambda: pyg(graph.x, graph.edge_index),
            lambda: infer_by_parts(pyg, graph.x, graph.edge_index, loader.split),
        ),
    }
    for name, works in cases.items():
        with torch.no_grad():
            expected, given = (work() for work in works)
            peaks = [peak(work) for work in works]
            seconds = interleaved({"whole": works[0], "parts": works[1]}, 3)
        apart = (expected - given).abs().max().item()
        print(
            f"inference, {name}: largest difference {judged(apart, 0.0, '{:.1e}')}, peak "
            f"{megabytes(peaks[1])} of {megabytes(peaks[0])} MB, {seconds['parts']:.2f} s of {seconds['whole']:.2f} s"
        )


def main() -> None:
    """All parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--edges", type=int, default=1_000_000, help="undirected ones")
    parser.add_argument("--communities", type=int, default=1000)
    parser.add_argument("--inside", type=float, default=0.8, help="share of edges within a community")
    parser.add_argument("--parts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=10, help="parts of a batch")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    graph = block_model(given.nodes, given.edges, given.communities, given.inside)
    start = time.perf_counter()
    split = GraphParts(given.parts).split(graph.edge_index.numpy(), given.nodes)
    between = time.perf_counter()
    loader = GraphLoader(graph, split, parts_per_batch=given.batch, generator=torch.Generator().manual_seed(0))
    done = time.perf_counter()
    held = sum(t.nbytes for t in loader._nodes.values()) + sum(
        a.nbytes for o in (loader._graph, loader._batches) for a in vars(o).values() if isinstance(a, np.ndarray)
    )
    print(
        f"{given.nodes} nodes, {given.edges} undirected edges and a self-loop each: {graph.edge_index.shape[1]} columns; "
        f"{given.parts} parts, {given.batch} to a batch, {len(loader)} batches; {split.cut / 2 / given.edges:.1%} of "
        f"edges cut; partitioning {between - start:.2f} s, sorting by part {done - between:.2f} s, once; the loader's "
        f"own copy of graph and features: {megabytes(held)} MB"
    )
    whole = GraphLoader(graph, np.zeros(given.nodes, np.int64)).batch([0])
    rows(graph, loader, whole, given.repeats)
    inference(graph, loader, whole, quality(graph, loader, whole, given.steps))


if __name__ == "__main__":
    main()
