"""How `RegionalAggregator` runs on the regions of a `KMeans`: bring samples together, run, and join.

    unbalanced   blocks (blocks, size, d)                    samples of one region each, padded; results go back
    balanced     regions (regions, capacity, d)              of samples
                 regions (regions, batch, capacity, d)       of tokens: sets, as the slices of a sequence are

Under `memory` the blocks, or regions, run some at a time. Enter at `clustered`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn

from ranger_nn.aggregate.pieces import Call, Concat, Stitch
from ranger_nn.aggregate.pooling import WeightedMean
from ranger_nn.errors import PartitionError
from ranger_nn.layers.clusters import Routes, check_join, check_kept
from ranger_nn.layers.regional import Layout, Result, piecewise, reduce
from ranger_nn.torch.layers.clusters import Clusters, drawn, masked, put, taken
from ranger_nn.torch.layers.rematerialise import Budget, at_once, budget, key_of, rematerialised
from ranger_nn.torch.layers.stacked import Stacked


class Clustered(Protocol):
    """What is asked here of `RegionalAggregator`, which calls this; see there for what each is."""

    training: bool
    regions: int | None
    partition: Any
    aggregator: Any
    local: Any
    allowed: int | None
    _sizes: dict[Any, list[int]]

    def _run(self, ids: list[int] | Tensor, stacked: Tensor) -> Tensor: ...

    def _local_modules(self) -> list[nn.Module]: ...

    def _shared(self) -> bool: ...

    def _weights(
        self, results: Sequence[Result], layout: Layout | None, numbers: bool = True
    ) -> list[Tensor] | None: ...

    def _region_weights(self, like: Tensor) -> Tensor: ...

    def _check_independent(
        self, pair: Any, parts: Sequence[Any], size: int, count: int, x: Tensor, key: Any
    ) -> None: ...


def clustered(layer: Clustered, clusters: Clusters, x: Tensor, present: Tensor | None, mask: Tensor | None) -> Tensor:
    """The layer's result on samples (batch, d) or tokens (batch, N, d)."""
    kind, over = clusters.partition, layer.aggregator
    check_join(kind, over, x.dim())
    routes = clusters(x, mask, sets=x.dim() == 3, separate=_loops(layer.local))
    there = _there(layer, routes, x, present, mask)
    y = _run(layer, clusters, routes, x)
    if kind.balanced and not isinstance(over, Stitch):
        return _over_sets(layer, y, routes, present)
    check_kept(routes.shape, y.shape)
    found = put(y, routes)
    if isinstance(over, Stitch):
        found = found if there is None else masked(found, there.flatten())
        return found.reshape(*x.shape[:-1], *found.shape[1:])
    return _over_tokens(layer, found.reshape(*x.shape[:-1], *found.shape[1:]), routes, there)


def _run(layer: Clustered, clusters: Clusters, routes: Routes, x: Tensor) -> Tensor:
    """Local results on samples by region, and a training step of the centres."""
    rows, zeros = x.reshape(-1, x.shape[-1]), clusters.partition.balanced
    if layer.allowed is None:
        together = taken(rows, routes, zeros)
        towards = clusters.follow(routes, together)
        return drawn(layer._run(_ids(routes, 0, routes.shape[0]), together), clusters.centres, towards)
    towards = clusters.follow(routes, taken(rows.detach(), routes, zeros)) if layer.training else None
    works = [_Blocks(layer, routes, a, b) for a, b in _chunks(layer, routes, x)]
    y = torch.cat(rematerialised([works], x, layer._local_modules(), layer._shared()))
    return drawn(y, clusters.centres, towards)


def _loops(local: Any) -> bool:
    """Does the local network run region by region."""
    return isinstance(local, nn.ModuleList | list) or (isinstance(local, Stacked) and not local.batched)


def _ids(routes: Routes, a: int, b: int) -> list[int] | Tensor:
    return list(range(a, b)) if routes.owner is None else routes.owner[a:b]


def _there(layer: Clustered, routes: Routes, x: Tensor, present: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Samples that are there, and whose region is."""
    if present is None:
        return mask
    if tuple(present.shape) != (x.shape[0], layer.regions):
        raise PartitionError(f"present is (batch, regions) = {(x.shape[0], layer.regions)}; got {tuple(present.shape)}")
    there = present.gather(1, routes.region.reshape(x.shape[0], -1)).reshape(x.shape[:-1])
    return there if mask is None else there & mask


def _over_tokens(layer: Clustered, y: Tensor, routes: Routes, there: Tensor | None) -> Tensor:
    """Reduction over the tokens (batch, N, ...) of all regions at once: merging in any grouping gives the same."""
    batch, n = y.shape[:2]
    result = Result(list(range(n)), y.movedim(1, 0))
    weights = layer._weights([result], None, numbers=False)
    if isinstance(layer.aggregator, WeightedMean) and weights is None:
        weights = [layer._region_weights(y)[routes.region].reshape(batch, n).T]
    over: Any = layer.aggregator
    return reduce(xp, over, [result], weights, there)


def _over_sets(layer: Clustered, y: Tensor, routes: Routes, present: Tensor | None) -> Tensor:
    """Join of the regions' own results (regions, batch, ...); regions without a token are absent."""
    clusters, batch, capacity = routes.shape
    loads = y.new_full((clusters, batch), capacity)
    if routes.used is not None:
        loads = routes.used.reshape(clusters, batch, capacity).sum(2).to(y.dtype)
        present = loads.T > 0 if present is None else present & (loads.T > 0)
    over, result = layer.aggregator, Result(list(range(clusters)), y)
    if isinstance(over, Stitch | Concat | Call):
        return piecewise(xp, over, [result], None, present)
    weights = layer._weights([result], None, numbers=False)
    if isinstance(over, WeightedMean) and weights is None:
        own = layer._region_weights(y)[:, None]
        weights = [own.expand(-1, batch) if isinstance(over.weights, tuple) else own * loads]
    return reduce(xp, over, [result], weights, present)


# ------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class _Blocks:
    """Some blocks, as work for the loop under `memory`."""

    layer: Clustered
    routes: Routes
    start: int
    stop: int

    def _slots(self, whole: Tensor) -> Tensor:
        size = whole.shape[0] // self.routes.shape[0]
        return whole[self.start * size : self.stop * size]

    def take(self, x: Tensor) -> Tensor:
        """The blocks' samples."""
        y = x.reshape(-1, x.shape[-1]).index_select(0, self._slots(self.routes.take))
        if self.routes.used is not None and self.layer.partition.balanced:
            y = masked(y, self._slots(self.routes.used))
        return y.reshape(self.stop - self.start, *self.routes.shape[1:], x.shape[-1])

    def run(self, taken: Tensor) -> Tensor:
        """Local results."""
        return self.layer._run(_ids(self.routes, self.start, self.stop), taken)

    def give(self, whole: Tensor, grad: Tensor, x: Tensor) -> None:
        """Each sample's gradient from its own slot."""
        grad = grad.reshape(-1, x.shape[-1])
        if self.routes.used is not None:
            grad = masked(grad, self._slots(self.routes.used))
        whole.view(-1, x.shape[-1]).index_add_(0, self._slots(self.routes.take), grad)


def _chunks(layer: Clustered, routes: Routes, x: Tensor) -> list[tuple[int, int]]:
    """Blocks that run together; what one needs is measured when shapes are first seen."""
    blocks, modules = routes.shape[0], layer._local_modules()
    key = (tuple(routes.shape), key_of(x, modules))

    def taken(start: int, stop: int) -> Budget:
        return budget(_Blocks(layer, routes, start, stop), x, modules, layer._shared())

    if key not in layer._sizes:
        each = [taken(i, i + 1) for i in range(blocks if isinstance(layer.local, nn.ModuleList) else 1)]
        one = Budget(max(b.region for b in each), max(b.kept for b in each))
        place = f"a region of {layer.partition}"
        layer._sizes[key] = [
            at_once(layer.allowed or 0, one, lambda n: taken(0, n), blocks, blocks * one.kept, x, place)
        ]
    (size,) = layer._sizes[key]
    if size < blocks:
        pair, *parts = (_Blocks(layer, routes, *ends) for ends in ((0, 2), (0, 1), (1, 2)))
        layer._check_independent(pair, parts, size, blocks, x, key)
    return [(a, min(a + size, blocks)) for a in range(0, blocks, size)]
