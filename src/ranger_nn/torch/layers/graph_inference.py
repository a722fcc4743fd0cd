"""`infer_by_parts`: any message-passing network on a whole graph, each layer run part by part, exactly.

    model(x, edges)        conv 1        norm, relu, ...      conv 2                   as the model is written
                        part 0 | 1 | 2     all nodes       part 0 | 1 | 2

While the model runs, its message-passing layers are replaced by `_Run.by_parts`: gather what a part reads (its nodes,
their in-edges, the halo that these come from), run the layer as it is, keep the rows of the part's own nodes. Messages,
which are many times the size of features, then live for one part at a time.

How far a layer reads decides whether that is exact. One hop is enough for what depends on in-edges and their sources.
A layer that normalises by degrees also needs the in-edges of its sources, which is two hops. torch_geometric's GCNConv
is spared these: its weights are normalised once over the whole graph, and the layer is run with them. For layers that
are not known, hops are found by trial (`_Call.trial`). Enter at `infer_by_parts`.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ranger_nn.errors import BudgetError, InputError
from ranger_nn.layers.graph import Ordered, SubGraph, grouped
from ranger_nn.partition.graph import GraphSplit, Partitioning, as_split
from ranger_nn.planning.budget import format_bytes, parse_memory

Layer = Callable[..., Any]
EDGES = ("edge_index", "edges")  # names of the parameter through which a layer takes the edges
TRIED, FARTHEST = 8, 4  # nodes on which hops are tried; hops tried before a layer is taken to read everything
# Layers of torch_geometric whose result at a node depends on its in-edges and their sources alone.
ONE_HOP = {
    "CGConv", "EdgeConv", "GATConv", "GATv2Conv", "GINConv", "GINEConv", "GraphConv", "NNConv", "ResGatedGraphConv",
    "SAGEConv", "TransformerConv",
}  # fmt: skip


def infer_by_parts(
    model: Layer | Sequence[Layer],
    x: Tensor,
    edges: Tensor,
    partition: Partitioning,
    *,
    memory: str | int | None = None,
    hops: int | None = None,
    **arguments: Any,
) -> Any:
    """What `model(x, edges, **arguments)` gives, its message-passing layers run part by part.

    A layer is an innermost module whose `forward` has a parameter `edge_index` or `edges`. All else (activations,
    normalisations, residual connections, pooling) runs as it is written, on all nodes: features of all nodes are held,
    messages of one part at a time.

    Results are those of the whole graph. Edges of a target keep their order, so that sums over them do not differ by a
    bit; a matrix product may round otherwise where its kernel depends on the number of rows. A layer of unknown kind is
    tried on 8 nodes with 1, 2, ... 4 hops until their results no longer change; where they always do, or where
    arguments or result are not tensors over nodes and edges, it runs whole, with a warning.

    Args:
        model: a module or a function; or a sequence of them (`nn.Sequential` too), called in turn, those with a
            parameter `edge_index` or `edges` with the edges and those of `arguments` that they take.
        x: (nodes, ...) features.
        edges: integers (2, edges), each column source -> target.
        partition: `GraphParts`, a `GraphSplit`, an array (nodes,) of parts, or a callable (edges, nodes) that gives one.
        memory: what a layer may take beside its arguments and its result, trials of hops left out, such as "500MB": as
            many parts as fit run at once. None: one part at a time.
        hops: how many hops every layer reads, where you know; None: found as above.
        arguments: further ones of the model, such as `edge_weight` (edges,).

    Returns:
        The model's result, without gradients; its modules are in evaluation mode meanwhile.

    Raises:
        InputError: edges of a wrong shape or type, or out of range; no layer that takes them; hops below 1.
        PartitionError: the partition does not suit the graph.
        BudgetError: a part does not fit in `memory`.
        MissingExtraError: `GraphParts` without pymetis.
    """
    whole = callable(model) and not isinstance(model, nn.Sequential)
    steps: list[Layer] = [model] if whole else list(model)  # type: ignore[list-item, arg-type]
    modules = [m for step in steps if isinstance(step, nn.Module) for m in step.modules()]
    layers = [m for m in modules if _is_layer(m)]
    if not layers and not any(_takes(step) for step in steps):
        raise InputError(
            f"infer_by_parts runs layers that take the edges through a parameter named {' or '.join(EDGES)}; none of "
            f"{', '.join(_name(s) for s in steps)} has one; give it that name, as torch_geometric's layers do"
        )
    if hops is not None and (isinstance(hops, bool) or not isinstance(hops, int) or hops < 1):
        raise InputError(
            f"hops is how far a layer reads, an integer from 1; got {hops!r}; leave it out to have it found"
        )
    run = _Run(as_split(partition, edges.cpu().numpy(), len(x)), parse_memory(memory), hops)
    with torch.no_grad(), _evaluating(modules), _replaced(layers, run):
        for step in steps:
            call = step if isinstance(step, nn.Module) else run.by_parts(step)
            if whole:
                return call(x, edges, **arguments)
            x = call(x, **_chosen(step, edges, arguments))
    return x


class _Run:
    """One inference: the assignment of nodes to parts, and the graphs that layers were called with."""

    def __init__(self, split: GraphSplit, allowed: int | None, hops: int | None) -> None:
        self.split, self.allowed, self.hops = split, allowed, hops
        self._ordered: list[tuple[Tensor, Ordered]] = []

    def ordered(self, edges: Tensor) -> Ordered:
        """The graph of these edges, ordered by part; once for the same edges."""
        for known, graph in self._ordered:
            if known is edges or torch.equal(known, edges):
                return graph
        graph = Ordered.of(GraphSplit.of(self.split.part_of, edges.cpu().numpy()))
        self._ordered.append((edges, graph))
        return graph

    def by_parts(self, layer: Layer) -> Layer:
        """A layer as a function that runs it part by part; what takes no edges, as it is."""
        if _takes(layer) is None:
            return layer
        forward = layer.forward if isinstance(layer, nn.Module) else layer
        signature = inspect.signature(forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            known = _one_hop(layer)
            inner = _normalised(layer, bound)
            work = _Call(inner or forward, bound, self)
            y = work.result(self.hops or (1 if known or inner else None)) if work.possible(layer) else None
            if y is not None:
                return y
            warnings.warn(
                f"infer_by_parts runs {_name(layer)} on the whole graph: {work.reason}; its messages are all held at "
                "once",
                stacklevel=2,
            )
            return forward(*args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call


class _Call:
    """One call of a layer: what it is given over nodes and edges, run on sub-graphs."""

    def __init__(self, forward: Layer, bound: inspect.BoundArguments, run: _Run) -> None:
        self.forward, self.bound, self.run = forward, bound, run
        self.reason = ""

    def possible(self, layer: Layer) -> bool:
        """Whether the layer can run on sub-graphs; if not, `reason` says why."""
        edges = next((self.bound.arguments[k] for k in EDGES if k in self.bound.arguments), None)
        if getattr(layer, "flow", "source_to_target") != "source_to_target":
            self.reason = "its messages go from target to source"
        elif not isinstance(edges, Tensor) or edges.layout != torch.strided or edges.ndim != 2 or len(edges) != 2:
            self.reason = "its edges are not a tensor (2, edges)"
        else:
            self.graph, self.device = self.run.ordered(edges), edges.device
        return not self.reason

    def result(self, hops: int | None) -> Tensor | None:
        """Rows of all nodes; None if that is not possible, and `reason` says why."""
        hops = hops or self.trial()
        if hops is None:
            self.reason = self.reason or f"its results change with the halo, up to {FARTHEST} hops"
            return None
        whole: Tensor | None = None
        for parts in self.groups(hops):
            rows = self.graph.rows(parts)
            y = self.on(self.graph.reads(rows, hops))
            if y is None:
                return None
            if whole is None:
                whole = y.new_empty(self.run.split.nodes, *y.shape[1:])
            whole[torch.from_numpy(self.graph.order[rows]).to(y.device)] = y
        return whole

    def on(self, part: SubGraph) -> Tensor | None:
        """The layer on a sub-graph: rows of its own nodes."""
        rows, columns = (
            torch.from_numpy(a).to(self.device)
            for a in (self.graph.order[part.rows], self.graph.columns[part.positions])
        )
        given = inspect.BoundArguments(self.bound.signature, self.bound.arguments.copy())
        for name, value in self.bound.arguments.items():
            if name in EDGES:
                given.arguments[name] = torch.from_numpy(part.edges).to(self.device)
            elif name.startswith("edge"):
                given.arguments[name] = _picked(value, columns, len(self.graph.columns))
            else:
                given.arguments[name] = _picked(value, rows, self.run.split.nodes)
        y = self.forward(*given.args, **given.kwargs)
        if not isinstance(y, Tensor) or not y.ndim or len(y) != len(rows):
            self.reason = "its result is not one tensor over nodes"
            return None
        return y[: part.own]

    def trial(self) -> int | None:
        """The hops from which on the results of some nodes, each by itself, no longer change, rounding aside.

        A node tells nothing where one hop more adds no nodes: what the layer reads beyond the edges would not show.
        """
        fed = np.flatnonzero(np.diff(self.graph.offsets))
        nodes = fed[:: max(1, len(fed) // TRIED)]
        for hops in range(1, FARTHEST + 1):
            pairs = [(self.graph.reads(n[None], hops), self.graph.reads(n[None], hops + 1)) for n in nodes]
            telling = [(near, far) for near, far in pairs if len(far.rows) > len(near.rows)]
            results = [(self.on(near), self.on(far)) for near, far in telling]
            if not telling:
                self.reason = f"{hops} hops reach all that any do, and it may read more than it reaches; state hops"
            if self.reason:
                return None
            if all(_same(a, b) for a, b in results):
                return hops
        return None

    def groups(self, hops: int) -> list[list[int]]:
        """Parts to run at once.

        The work of a layer grows in proportion to the nodes and the edges that it is given, so that if a part takes p
        bytes, then parts with k times its nodes and k times its edges in all take no more than k p.
        """
        allowed, parts = self.run.allowed, range(self.graph.parts)
        if allowed is None:
            return [[p] for p in parts]
        reads = [self.graph.reads(self.graph.rows([p]), hops) for p in parts]
        sizes = np.array([(len(r.rows), max(1, len(r.positions))) for r in reads])
        largest = reads[int(np.argmax(sizes[:, 1]))]
        with _LiveBytes() as live:
            self.on(largest)
        shares = sizes / (len(largest.rows), max(1, len(largest.positions)))
        least = int(np.ceil(live.peak * shares.max()))
        if least > allowed:
            raise BudgetError(
                f"a layer runs on at least one part at a time: the largest of {self.graph.parts} parts takes "
                f"{format_bytes(least)}, and memory={format_bytes(allowed)} is allowed; allow that much, or cut the "
                "graph in more parts",
                allowed=allowed,
                least=least,
            )
        return grouped(shares, allowed / max(1, live.peak))


class _LiveBytes(TorchDispatchMode):
    """Most bytes at one time in tensors that operators made; the scratch memory inside an operator is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), counted=False)
        made = func(*args, **(kwargs or {}))
        self._see(made, counted=True)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return made

    def _see(self, values: Any, counted: bool) -> None:
        """Note storages not seen before, and forget those that are gone."""
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                storage = value.untyped_storage()
                self._sizes.setdefault(StorageWeakRef(storage), storage.nbytes() if counted else 0)


def _picked(value: Any, index: Tensor, size: int) -> Any:
    """Rows of what has `size` of them, inside tuples too; all else as it is."""
    if isinstance(value, tuple):
        return tuple(_picked(v, index, size) for v in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == size:
        return value[index.to(value.device)]
    return value


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal but for rounding."""
    if a is None or b is None:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = b.abs().max().item() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=scale * min(1e-2, 1e3 * torch.finfo(a.dtype).eps), equal_nan=True)


def _takes(layer: Layer) -> str | None:
    """The name of the parameter through which a callable takes the edges."""
    try:
        known = inspect.signature(layer.forward if isinstance(layer, nn.Module) else layer).parameters
    except (TypeError, ValueError):  # a built-in function: it has no signature
        return None
    return next((name for name in EDGES if name in known), None)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module takes the edges, and none inside it does."""
    inside = (m for m in module.modules() if m is not module)
    return _takes(module) is not None and not any(_takes(m) for m in inside)


def _chosen(step: Layer, edges: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a step of a sequence is given beside the result of the last."""
    name = _takes(step)
    if name is None:
        return {}
    known = inspect.signature(step.forward if isinstance(step, nn.Module) else step).parameters
    return {name: edges} | {k: v for k, v in arguments.items() if k in known}


def _name(layer: Layer) -> str:
    """How a message calls a layer."""
    return getattr(layer, "__name__", type(layer).__name__)


def _one_hop(layer: Layer) -> bool:
    """Whether this is a layer of torch_geometric, and not of a class derived from it, that reads one hop."""
    kind = type(layer)
    return kind.__module__.startswith("torch_geometric.") and kind.__name__ in ONE_HOP


def _normalised(layer: Layer, bound: inspect.BoundArguments) -> Layer | None:
    """For torch_geometric's GCNConv: the layer without its normalisation, its arguments replaced by the normalised."""
    kind, edges = type(layer), bound.arguments.get("edge_index")
    if (
        not kind.__module__.startswith("torch_geometric.")
        or kind.__name__ != "GCNConv"
        or not isinstance(edges, Tensor)
    ):
        return None
    plain: Any = copy.copy(layer)  # shares parameters and hooks
    plain.__dict__.pop("forward", None)
    if plain.normalize and edges.layout == torch.strided:
        from torch_geometric.nn.conv.gcn_conv import gcn_norm

        x, weight = bound.arguments["x"], bound.arguments.get("edge_weight")
        bound.arguments["edge_index"], bound.arguments["edge_weight"] = plain._cached_edge_index or gcn_norm(
            edges, weight, len(x), plain.improved, plain.add_self_loops, plain.flow, x.dtype
        )
        plain.normalize = False
    forward: Layer = plain.forward
    return forward


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode, and afterwards as they were."""
    training = [m.training for m in modules]
    try:
        for m in modules:
            m.training = False
        yield
    finally:
        for m, was in zip(modules, training):
            m.training = was


@contextmanager
def _replaced(layers: Sequence[nn.Module], run: _Run) -> Iterator[None]:
    """Layers whose `forward` runs them by parts, and afterwards as they were."""
    before = [(m, m.__dict__.get("forward")) for m in layers]
    try:
        for m in layers:
            m.forward = run.by_parts(m)
        yield
    finally:
        for m, forward in before:
            if forward is None:
                m.__dict__.pop("forward", None)
            else:
                m.forward = forward
