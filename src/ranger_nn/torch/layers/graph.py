"""`GraphLoader`: a graph by parts, for training any message-passing network in PyTorch.

A message-passing layer takes node features and the columns of edges, source -> target, as torch_geometric's do:
`layer(x, edge_index, ...)`. torch_geometric is not needed; where it is there, its `Data` is taken and given as it is.

    loader          nodes sorted by part once; tensors over nodes and edges kept in that order
    a batch         slices of some parts; edges among them kept, in numbers of the batch; edges to other parts left out

Leaving edges out is what training by parts (Cluster-GCN) costs; `infer_by_parts` leaves none out. The arithmetic of
sub-graphs is `ranger_nn.layers.graph`'s; here they get their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ranger_nn.errors import InputError, PartitionError
from ranger_nn.layers.graph import Batches, Ordered, check_batch
from ranger_nn.partition.graph import Partitioning, as_split
from ranger_nn.torch.layers.graph_inference import infer_by_parts

__all__ = ["GraphBatch", "GraphLoader", "infer_by_parts"]


class GraphBatch(SimpleNamespace):
    """Some parts of a graph: what was given over nodes and edges, and `edge_index`, `n_id`, `offsets`, `parts`."""

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same with its tensors on a device."""
        return GraphBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})


class GraphLoader:
    """Batches of a graph's parts for training: each part once an epoch, in random order.

    Cluster-GCN (Chiang et al. 2019, section 3.2, stochastic multiple partitions): a batch joins `parts_per_batch`
    parts and keeps all edges among their nodes. A part is a slice of each tensor, and a batch costs work in proportion
    to the in-edges of its own nodes. torch-sparse and pyg-lib are not needed.

    Args:
        graph: a `torch_geometric.data.Data`, a mapping, or any object with attributes: `edge_index`, integers
            (2, edges), each column source -> target; tensors over nodes (`x`, `y`, `train_mask`, ...: first dimension
            nodes) and over edges (named `edge...`, first dimension edges). What is neither is passed on as it is.
        partition: `GraphParts`, a `GraphSplit`, an array (nodes,) of parts, or a callable (edges, nodes) that gives one.
        parts_per_batch: parts of a batch; the last one takes what is left.
        shuffle: whether each epoch deals the parts anew.
        generator: of the shuffling; None: PyTorch's own.
        parts: numbers of the parts to visit, such as `range(rank, parts, processes)`; None: all.

    Iteration gives batches of the class of `graph` if that is a `Data`, else `GraphBatch`. They have the tensors of
    their nodes and edges, `edge_index` (int64, in numbers of the batch, sorted by target, edges of one target in the
    order given), `offsets` (nodes + 1,) (in-edges of node i are `edge_index[:, offsets[i]:offsets[i + 1]]`), `n_id`
    (the nodes, as given), `num_nodes` and `parts`. With one part to a batch, tensors over nodes are slices of the
    loader's own copies: do not write into them.

    Raises:
        InputError: no `edge_index`, or one of a wrong shape or type; nothing that tells how many nodes there are.
        PartitionError: more parts than nodes or than there are, no edges, a split of another graph.
        MissingExtraError: `GraphParts` without pymetis.
    """

    def __init__(
        self,
        graph: Any,
        partition: Partitioning,
        *,
        parts_per_batch: int = 1,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        values = _values(graph)
        edges = _edges(values)
        nodes = _nodes(values)
        self.split = as_split(partition, edges.cpu().numpy(), nodes)
        self.parts = list(range(self.split.parts) if parts is None else parts)
        self._check_parts()
        check_batch(parts_per_batch, len(self.parts))
        self.parts_per_batch, self.shuffle, self.generator = parts_per_batch, shuffle, generator
        self._graph = Ordered.of(self.split)
        self._batches = Batches(self._graph)
        self._device = edges.device
        self._make = getattr(type(graph), "from_dict", lambda found: GraphBatch(**found))
        rows, columns = (torch.from_numpy(a) for a in (self._graph.order, self._graph.columns))
        self._nodes: dict[str, Tensor] = {}
        self._edges: dict[str, Tensor] = {}
        self._others: dict[str, Any] = {}
        for name, value in values.items():
            size = len(value) if isinstance(value, Tensor) and value.ndim else None
            if name.startswith("edge") and size == edges.shape[1]:
                self._edges[name] = value[columns.to(value.device)]
            elif not name.startswith("edge") and size == nodes:
                self._nodes[name] = value[rows.to(value.device)]
            else:
                self._others[name] = value

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.parts) // self.parts_per_batch)

    def __iter__(self) -> Iterator[Any]:
        """One epoch."""
        order = self.parts
        if self.shuffle:
            order = [self.parts[i] for i in torch.randperm(len(self.parts), generator=self.generator).tolist()]
        for i in range(0, len(order), self.parts_per_batch):
            yield self.batch(order[i : i + self.parts_per_batch])

    def batch(self, parts: Sequence[int]) -> Any:
        """The batch of these parts, each at most once; its nodes are in the order of parts, ascending."""
        graph = self._graph
        part = self._batches.batch(parts, positions=bool(self._edges))
        slices = [slice(int(graph.starts[p]), int(graph.starts[p + 1])) for p in sorted(parts)]
        found = dict(self._others)
        for name, value in self._nodes.items():
            found[name] = value[slices[0]] if len(slices) == 1 else torch.cat([value[s] for s in slices])
        at = torch.from_numpy(part.positions)
        found |= {name: value[at.to(value.device)] for name, value in self._edges.items()}
        arrays = {"edge_index": part.edges, "offsets": part.offsets, "n_id": graph.order[part.rows]}
        found |= {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        return self._make(found | {"num_nodes": part.own, "parts": sorted(parts)})

    def _check_parts(self) -> None:
        """Refuse parts that are not there, or twice."""
        known = range(self.split.parts)
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(known):
            raise PartitionError(
                f"parts to visit are some of 0 to {self.split.parts - 1}, each once; got {self.parts}; for several "
                "processes, range(rank, number of parts, processes)"
            )


def _values(graph: Any) -> dict[str, Any]:
    """What a graph holds, by name."""
    if isinstance(graph, Mapping):
        return dict(graph)
    return dict(graph.to_dict() if hasattr(graph, "to_dict") else vars(graph))


def _edges(values: dict[str, Any]) -> Tensor:
    """Take `edge_index` out of the values."""
    edges = values.pop("edge_index", None)
    if not isinstance(edges, Tensor) or edges.layout != torch.strided:
        raise InputError(
            "a graph has its edges in edge_index, an integer tensor (2, edges), each column source -> target; got "
            f"{type(edges).__name__} beside {', '.join(values) or 'nothing'}"
        )
    return edges


def _nodes(values: dict[str, Any]) -> int:
    """How many nodes: `num_nodes`, or the rows of `x`."""
    count, x = values.pop("num_nodes", None), values.get("x")
    if count is None and isinstance(x, Tensor) and x.ndim:
        count = len(x)
    if count is None:
        raise InputError(
            f"a graph states its nodes by x, (nodes, features), or by num_nodes; got {', '.join(values) or 'neither'}"
        )
    return int(count)
