"""`RegionalAggregator` for PyTorch: parameters, the local network on batches of regions, and the loop under `memory`.

What is cut and joined is `ranger_nn.layers.regional`'s. Three ways to run the local network on a group of regions:

    shared        one network: regions are folded into the batch, one call
    per region    stacked parameters (regions, ...): torch.func.vmap over regions, one call; or a loop where the
                  network has buffers or recurrent layers, which vmap does not take
    a list        one module each: a loop

Regions of a `KMeans` are sets of samples, not boxes: `ranger_nn.torch.layers.clusters` brings them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn

from ranger_nn.aggregate.monoid import Moments
from ranger_nn.aggregate.names import aggregator as by_name
from ranger_nn.aggregate.pieces import Call, Concat, Stitch
from ranger_nn.aggregate.pooling import LogSumExp, Softmax, WeightedMean
from ranger_nn.errors import InputError, PartitionError
from ranger_nn.layers.regional import Group, Layout, Result, piecewise, reduce, without_absent
from ranger_nn.partition.blocks import Blocks
from ranger_nn.partition.grid import Grid
from ranger_nn.partition.kmeans import KMeans
from ranger_nn.partition.time import TimeSlices
from ranger_nn.planning.budget import parse_memory
from ranger_nn.torch.layers.clustered import clustered
from ranger_nn.torch.layers.clusters import Clusters
from ranger_nn.torch.layers.cut import add_back, cut
from ranger_nn.torch.layers.passes import Work
from ranger_nn.torch.layers.rematerialise import Budget, at_once, budget, key_of, rematerialised
from ranger_nn.torch.layers.samples import Part, independent
from ranger_nn.torch.layers.stacked import Stacked
from ranger_nn.torch.layers.state import Again, modules_in

Local = Callable[..., Any]


class RegionalAggregator(nn.Module):
    """Cut the input in regions, run a local network on each, join the results.

    Args:
        partition: `Grid`, `TimeSlices`, `Blocks`, `KMeans` (of `ranger_nn`), or a callable that gives the list of parts.
        aggregator: "sum", "mean", "weighted_mean", "max", "min", "logsumexp", "softmax", "moments", "stitch", "concat",
            an object of `ranger_nn.aggregate`, or a callable that takes the list of the regions' results. With a
            callable partition and no `local`, a callable is the local network and the parts are summed.
        local: network applied to a region: (batch, ...) in, (batch, ...) out. One module for all regions, a list with
            one for each, or None for the region itself.
        per_region: one set of parameters for each region, made from `local` by copying it and calling
            `reset_parameters` of its modules.
        coordinates: with a `Grid`, also give the local network each element's position in its region, -1 to 1,
            as one more feature for each axis that is cut (axis 1, or the last one if that is not cut).
        memory: run the regions one after the other in as large groups as this allows (bytes, or text such as
            "512MB"), and compute each group again in backward, so that activations of one group are alive at a
            time. The bytes of a region are measured when a shape is first seen. Without it: all regions at once, to
            the same numbers, save dropout's masks in training, which each group draws itself (other random numbers are
            refused). `local` must treat each sample of a batch by itself, batch norm aside, which is taken over all regions.

    Shapes:
        x (batch, ...). A `Grid` cuts the last axes, `TimeSlices` axis 1, `Blocks` the last, unless they say otherwise.
        A `KMeans` takes samples (batch, d) or tokens (batch, N, d), each to the region of its nearest centre; `stitch`
        puts results back to their samples. Unbalanced, the local network is given samples (n, d) of a region, each by
        itself, and a reduction of tokens is over all of them, each with its region's weight. Balanced, it is given
        (batch, capacity, d) of tokens, sets in any order with zeros in places that no token takes, and every aggregator
        joins the regions; of samples (batch, d) it is given (capacity, d), and there is only `stitch`, as a sample has
        one region. Centres: `adapt`, and the partition's `update` in training.
        Result: for reductions the shape of one region's result, for "stitch" that of the regions in place, for "concat"
        the results' with a longer last axis.

    Raises:
        PartitionError: more regions than elements, results that the aggregator cannot join, unknown names, under
            `memory` a local network that joins samples of a batch, changes its state by how many there are, or draws
            random numbers besides dropout.
        BudgetError: a single region does not fit into `memory`.

    Source: the article's RegionalAggregator; weights and scores as in `ranger_nn.aggregate.pooling`.
    """

    def __init__(
        self,
        partition: Any,
        aggregator: Any = "sum",
        local: Local | Sequence[Local] | None = None,
        *,
        per_region: bool = False,
        coordinates: bool = False,
        memory: str | int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(partition, type) or not (
            isinstance(partition, Grid | TimeSlices | Blocks | KMeans) or callable(partition)
        ):
            raise PartitionError(
                f"a partition is a Grid, TimeSlices, Blocks or KMeans, or a callable that gives parts; got {partition!r}. "
                "GraphParts has GraphLoader and infer_by_parts"
            )
        if coordinates and isinstance(partition, KMeans):
            raise PartitionError(f"coordinates=True needs a Grid; got {partition}")
        described = isinstance(partition, Grid | TimeSlices | Blocks)
        if not described and local is None and callable(aggregator):
            aggregator, local = "sum", aggregator
        self.partition = partition
        self.aggregator = by_name(aggregator)
        self.coordinates = coordinates
        self.allowed = parse_memory(memory)
        self.regions: int | None = partition.count if described or isinstance(partition, KMeans) else None
        self.described = described
        self.clusters = Clusters(partition) if isinstance(partition, KMeans) else None
        if isinstance(aggregator, nn.Module):
            self.join = aggregator
        self._set_local(local, per_region)
        self._set_weights()
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._sizes: dict[Any, list[int]] = {}
        self._independent: dict[Any, bool] = {}
        self._maps: dict[Any, list[Tensor]] = {}

    def _set_local(self, local: Local | Sequence[Local] | None, per_region: bool) -> None:
        self.stacked = per_region
        if isinstance(local, list | tuple | nn.ModuleList):
            if self.regions is not None and len(local) != self.regions:
                raise PartitionError(
                    f"one local network for each region: {self.partition} has {self.regions} regions, local has "
                    f"{len(local)} networks"
                )
            if per_region:
                raise PartitionError(
                    "per_region=True copies one network; a list of local networks is per region already"
                )
            modules = [m if isinstance(m, nn.Module) else _Function(m) for m in local]
            self.local: Any = nn.ModuleList(modules)
            return
        if per_region:
            if not isinstance(local, nn.Module) or self.regions is None:
                raise PartitionError(
                    f"per_region=True needs a module and a partition with a known number of regions; got local="
                    f"{type(local).__name__} and {self.partition}. Give a list of local networks, or counts as in Grid(2, 2)"
                )
            self.local = Stacked(local, self.regions)
            return
        self.local = local

    def _set_weights(self) -> None:
        over = self.aggregator
        if isinstance(over, Softmax):
            self.score: nn.Module = _Score(over)
        if not isinstance(over, WeightedMean):
            return
        if over.weights == "predicted":
            self.score = _Score(Softmax())
        elif self.regions is None and over.weights != "size":
            raise PartitionError(
                f"weights for each region need a known number of regions; {self.partition} has none. Use "
                'WeightedMean("size"), WeightedMean("predicted"), or counts as in Grid(2, 2)'
            )
        elif over.weights == "learned":
            self.log_weight = nn.Parameter(torch.zeros(self.regions or 0))
        elif isinstance(over.weights, tuple):
            if len(over.weights) != self.regions:
                raise PartitionError(
                    f"{len(over.weights)} weights were given for {self.regions} regions of {self.partition}"
                )
            self.register_buffer("weight", torch.tensor(over.weights), persistent=False)

    def forward(self, x: Tensor, present: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Join of the local results.

        Args:
            x: (batch, ...).
            present: (batch, regions) bool: False for regions that are absent and must not count; None: all count.
            mask: with `KMeans`, (batch,) or (batch, N) bool: False for samples that are absent, which give zero or do
                not count.
        """
        if not isinstance(x, Tensor):
            raise InputError(f"RegionalAggregator takes a torch.Tensor; got {type(x).__name__}. Use torch.as_tensor")
        for name, given in (("present", present), ("mask", mask)):
            if given is not None and given.dtype != torch.bool:
                raise InputError(f"{name} is True for what is there: a bool tensor; got {given.dtype}. Use {name} > 0")
        if self.clusters is not None:
            return clustered(self, self.clusters, x, present, mask)
        if mask is not None:
            raise PartitionError(f"mask is for samples of KMeans regions; {self.partition} takes present=")
        layout = self._layout(x) if self.described else None
        results = self._cut_results(x, layout) if layout is not None else self._part_results(x)
        if present is not None and tuple(present.shape) != (x.shape[0], sum(len(r.ids) for r in results)):
            raise PartitionError(
                f"present is (batch, regions) = {(x.shape[0], sum(len(r.ids) for r in results))}; got {tuple(present.shape)}"
            )
        over = self.aggregator
        if isinstance(over, Stitch | Concat | Call):
            return piecewise(xp, over, results, layout, present)
        if isinstance(over, WeightedMean | Softmax | Moments | LogSumExp):
            results = [Result(r.ids, _fractional(r.y)) for r in results]
        return reduce(xp, over, results, self._weights(without_absent(xp, results, present), layout), present)

    def _layout(self, x: Tensor) -> Layout:
        """The partition on this shape; made once."""
        shape, rank = tuple(x.shape), self.partition.rank
        if torch.compiler.is_compiling():
            return Layout.of(self.partition, shape, range(len(shape) - rank, len(shape)))
        if shape not in self._layouts:
            self._layouts[shape] = Layout.of(self.partition, shape, range(len(shape) - rank, len(shape)))
        return self._layouts[shape]

    # ------------------------------------------------------------------------------------ local

    def _cut_results(self, x: Tensor, layout: Layout) -> list[Result]:
        groups = layout.groups
        if self.allowed is None:
            works = [_Cut(self, layout, g) for g in groups]
            return [Result(w.group.ids, w.run(cut(x, layout, w.group))) for w in works]
        if torch.compiler.is_exporting():
            raise PartitionError(
                "memory= is a loop with a backward of its own, which no exported program holds: set layer.allowed = None "
                "before the export, or make the layer without memory"
            )
        return self._looped(x, layout)

    @torch.compiler.disable
    def _looped(self, x: Tensor, layout: Layout) -> list[Result]:
        """Groups under memory."""
        sizes = self._at_once(x, layout)
        lists = [[_Cut(self, layout, p) for p in g.parts(n)] for g, n in zip(layout.groups, sizes)]
        results = rematerialised(lists, x, self._local_modules(), self._shared())
        return [Result(w.group.ids, y) for w, y in zip([w for works in lists for w in works], results)]

    def _part_results(self, x: Tensor) -> list[Result]:
        again = Again(x.device, modules_in(self.partition)) if self.allowed is not None else None
        parts = list(self.partition(x))
        if not parts:
            raise PartitionError(f"the partition {self.partition} gave no parts for an input of shape {tuple(x.shape)}")
        if isinstance(self.local, nn.ModuleList) and len(self.local) != len(parts):
            raise PartitionError(f"one local network for each part: {len(parts)} parts, {len(self.local)} networks")
        if again is None:
            return [Result([i], self._run([i], part.unsqueeze(0))) for i, part in enumerate(parts)]
        return self._looped_parts(x, len(parts), again)

    @torch.compiler.disable
    def _looped_parts(self, x: Tensor, count: int, again: Again) -> list[Result]:
        """Parts of a callable under memory, one at a time."""
        works, modules = [_Part(self, i, again) for i in range(count)], self._local_modules()
        key = (count, key_of(x, modules))
        if key not in self._sizes:
            each = [budget(w, x, modules, False) for w in works]
            kept = sum(b.kept for b in each)
            places = [f"part {i} of {self.partition}" for i in range(count)]
            self._sizes[key] = [
                at_once(self.allowed or 0, b, each.__getitem__, 1, kept, x, p) for b, p in zip(each, places)
            ]
        return [Result([i], y) for i, y in enumerate(rematerialised([[w] for w in works], x, modules, False))]

    # --------------------------------------------------------------------------------- clusters

    def adapt(self, data: Tensor) -> None:
        """With `KMeans`: put the centres where K-means finds those of `data` (samples, d) or (batch, N, d).

        Raises:
            PartitionError: another partition.
            InputError: NaN or infinite numbers, fewer samples than clusters.
        """
        if self.clusters is None:
            raise PartitionError(f"adapt fits the centres of KMeans; {self.partition} follows from shapes")
        self.clusters.adapt(data)

    def _local_modules(self) -> list[nn.Module]:
        """What runs on regions; of stacked copies also the module that is applied."""
        return modules_in([self.local, self.partition, self.local.module if isinstance(self.local, Stacked) else None])

    def _shared(self) -> bool:
        """Is a group of regions one call of one network."""
        return not isinstance(self.local, nn.ModuleList | Stacked)

    def _placed(self, stacked: Tensor, layout: Layout, group: Group) -> Tensor:
        """With `coordinates`: each element's position as more features."""
        if not self.coordinates:
            return stacked
        axis = -1 if 1 in layout.axes else 2
        maps = []
        for along in self._positions(layout, group, stacked):
            wanted = list(stacked.shape)
            wanted[axis] = 1
            maps.append(along.expand(wanted))
        return torch.cat([stacked, *maps], axis)

    def _positions(self, layout: Layout, group: Group, like: Tensor) -> list[Tensor]:
        """Positions along each cut axis, to be broadcast to the stacked regions; made once for each group."""
        key = (layout.sizes, group.regions[0].index, len(group.regions), like.dim(), like.dtype, like.device)
        if key not in self._maps:
            self._maps[key] = []
            for d, rows in enumerate(layout.coordinates(group)):
                shape = [len(rows), *[1] * (like.dim() - 1)]
                shape[layout.axes[d] + 1] = len(rows[0])
                self._maps[key].append(torch.tensor(rows, dtype=like.dtype, device=like.device).reshape(shape))
        return self._maps[key]

    def _run(self, ids: list[int] | Tensor, stacked: Tensor) -> Tensor:
        """Local network on stacked regions (regions, batch, ...)."""
        if self.local is None:
            return stacked
        if isinstance(self.local, Stacked):
            return self.local(ids, stacked)
        if isinstance(self.local, nn.ModuleList):
            return _stack([self.local[int(i)](part) for i, part in zip(ids, stacked.unbind(0))], ids)
        folded = _tensor(self.local(stacked.flatten(0, 1)))
        if folded.shape[:1] != (stacked.shape[0] * stacked.shape[1],):
            raise PartitionError(
                f"the local network keeps the batch: it was given {stacked.shape[0] * stacked.shape[1]} samples "
                f"({stacked.shape[0]} regions of a batch of {stacked.shape[1]}) and gave shape {tuple(folded.shape)}"
            )
        return folded.unflatten(0, (stacked.shape[0], stacked.shape[1]))

    def _at_once(self, x: Tensor, layout: Layout) -> list[int]:
        """Regions of each group that run together; measured when a shape is first seen."""
        modules = self._local_modules()
        key = key_of(x, modules)
        if key not in self._sizes:
            ones = [self._measured(x, layout, g, modules) for g in layout.groups]
            kept = sum(len(g.regions) * one.kept for g, one in zip(layout.groups, ones))
            self._sizes[key] = [self._size(x, layout, g, modules, one, kept) for g, one in zip(layout.groups, ones)]
        for size, group in sorted(zip(self._sizes[key], layout.groups), key=lambda found: -found[0]):
            if size < len(group.regions):
                ends = Group((group.regions[0], group.regions[-1]))
                parts = [_Cut(self, layout, Group((r,))) for r in ends.regions]
                self._check_independent(_Cut(self, layout, ends), parts, size, len(group.regions), x, key)
                break
        return self._sizes[key]

    def _check_independent(
        self, pair: Work, parts: Sequence[Work], size: int, regions: int, x: Tensor, key: Any
    ) -> None:
        """Refuse a local network whose result depends on which regions run together.

        Args:
            pair: two regions.
            parts: each by itself.
            size: regions that run together.
            regions: of one call without memory.
            x: the input.
            key: under which it is remembered; samples that are all the same say too little, and it is done again.
        """
        if not self._shared() or self.local is None or self._independent.get(key):
            return
        modules, axis = self._local_modules(), 0
        batch = parts[0].take(x.detach()).shape[1]
        if size == 1 and batch > 1:
            pair, parts, axis = parts[0], [Part(parts[0], 0, 1), Part(parts[0], 1, None)], 1
        elif size == 1 and key not in self._independent:
            with torch.no_grad():
                one = budget(parts[0], x, modules, True)
            if 2 * (one.region + regions * one.kept) > (self.allowed or 0):  # two at once do not fit
                self._independent[key] = True
                return
        name = getattr(self.local, "__name__", type(self.local).__name__)
        self._independent[key] = independent(pair, parts, axis, x, modules, name)

    def _measured(self, x: Tensor, layout: Layout, group: Group, modules: list[nn.Module]) -> Budget:
        """What a region takes; of a list of networks the one that takes most."""
        each = group.regions if isinstance(self.local, nn.ModuleList) else group.regions[:1]
        found = [budget(_Cut(self, layout, Group((r,))), x, modules, self._shared()) for r in each]
        return Budget(max(b.region for b in found), max(b.kept for b in found))

    def _size(self, x: Tensor, layout: Layout, group: Group, modules: list[nn.Module], one: Budget, kept: int) -> int:
        def several(count: int) -> Budget:
            return budget(_Cut(self, layout, Group(group.regions[:count])), x, modules, self._shared())

        place = f"region {group.ids[0]} of {self.partition}"
        return at_once(self.allowed or 0, one, several, len(group.regions), kept, x, place)

    # ---------------------------------------------------------------------------------- weights

    def _weights(self, results: Sequence[Result], layout: Layout | None, numbers: bool = True) -> list[Tensor] | None:
        """Weights or scores of each group; `numbers`: also those that do not come from the results."""
        over = self.aggregator
        if isinstance(over, Softmax):
            return [self.score(r.y) for r in results]
        if not isinstance(over, WeightedMean):
            return None
        if over.weights == "predicted":
            return [torch.sigmoid(self.score(r.y)) for r in results]
        if not numbers:
            return None
        return [self._own_weights(layout, r)[r.ids].unsqueeze(1) for r in results]

    def _region_weights(self, like: Tensor) -> Tensor:
        """Of each region of a `KMeans`, beside its number of samples: given, learned, or 1."""
        given = self.aggregator.weights if isinstance(self.aggregator, WeightedMean) else "size"
        if isinstance(given, tuple):
            return self.get_buffer("weight").to(like.dtype)
        return self.log_weight.exp().to(like.dtype) if given == "learned" else like.new_ones(self.regions or 0)

    def _own_weights(self, layout: Layout | None, result: Result) -> Tensor:
        if isinstance(self.aggregator, WeightedMean) and isinstance(self.aggregator.weights, tuple):
            return self.get_buffer("weight").to(result.y.dtype)
        if layout is None:
            raise PartitionError('WeightedMean("size") needs a Grid, TimeSlices or Blocks; give the weights')
        share = torch.tensor(layout.shares(), dtype=result.y.dtype, device=result.y.device)
        learned = isinstance(self.aggregator, WeightedMean) and self.aggregator.weights == "learned"
        return share * self.log_weight.exp().to(share.dtype) if learned else share

    def extra_repr(self) -> str:
        """Partition and aggregator."""
        return f"{self.partition}, {self.aggregator}"


@dataclass(frozen=True)
class _Cut:
    """Regions of a described partition, as work for the loop."""

    layer: RegionalAggregator
    layout: Layout
    group: Group

    def take(self, x: Tensor) -> Tensor:
        """Stacked regions, not as a view of x: the local network may write in place."""
        found = cut(x, self.layout, self.group)
        return found.clone() if found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else found

    def run(self, taken: Tensor) -> Tensor:
        """Local results."""
        return self.layer._run(self.group.ids, self.layer._placed(taken, self.layout, self.group))

    def give(self, whole: Tensor, grad: Tensor, x: Tensor) -> None:
        """Gradients in their places."""
        add_back(whole, grad, self.layout, self.group)


@dataclass(frozen=True)
class _Part:
    """One part of a callable partition, as work for the loop."""

    layer: RegionalAggregator
    index: int
    again: Again

    def take(self, x: Tensor) -> Tensor:
        """All of x: the callable may have parameters."""
        return x

    def run(self, taken: Tensor) -> Tensor:
        """The part's local result."""
        with self.again():
            part = list(self.layer.partition(taken))[self.index].unsqueeze(0)
        return self.layer._run([self.index], part)

    def give(self, whole: Tensor, grad: Tensor, x: Tensor) -> None:
        """The gradient through the callable."""
        whole += grad


class _Function(nn.Module):
    """A function beside modules in a list of local networks."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """function(x)."""
        return self.function(x)


class _Score(nn.Module):
    """One number for each region's result: (regions, batch, features ...) -> (regions, batch)."""

    def __init__(self, kind: Softmax) -> None:
        super().__init__()
        self.gate: nn.Module | None = None
        if kind.hidden is None:
            self.score: nn.Module = nn.LazyLinear(1, bias=False)
            return
        self.score = nn.Sequential(nn.LazyLinear(kind.hidden), nn.Tanh())
        self.gate = nn.Sequential(nn.LazyLinear(kind.hidden), nn.Sigmoid()) if kind.gated else None
        self.query = nn.Linear(kind.hidden, 1, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """Scores; what is more than a vector is averaged over all axes but the features (axis 1 of a map)."""
        features = y.flatten(3).mean(3) if y.dim() > 4 else y.mean(2) if y.dim() == 4 else y
        if features.dim() == 2:
            features = features.unsqueeze(-1)
        hidden = self.score(features)
        if not hasattr(self, "query"):
            return hidden.squeeze(-1)
        return self.query(hidden if self.gate is None else hidden * self.gate(features)).squeeze(-1)


def _fractional(y: Tensor) -> Tensor:
    """Integers as numbers that weights do not round to zero."""
    return y if y.is_floating_point() or y.is_complex() else y.to(torch.get_default_dtype())


def _tensor(y: Any) -> Tensor:
    """The tensor of a local network's result: of a recurrent layer the outputs, not the states."""
    return y[0] if isinstance(y, tuple) else y


def _stack(results: Sequence[Any], ids: Iterable[Any]) -> Tensor:
    tensors = [_tensor(y) for y in results]
    if len({tuple(t.shape) for t in tensors}) > 1:
        raise PartitionError(
            "local networks of regions of one shape give results of one shape; got "
            + ", ".join(f"{tuple(t.shape)} for region {i}" for i, t in zip(ids, tensors))
        )
    return torch.stack(tensors)
