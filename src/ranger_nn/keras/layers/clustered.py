"""How Keras's `RegionalAggregator` runs on the regions of a `KMeans`: bring samples together, run, and join.

As in `ranger_nn.torch.layers.clustered`, which has the shapes. Enter at `clustered`.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from ranger_nn.aggregate.pieces import Call, Concat, Stitch
from ranger_nn.aggregate.pooling import WeightedMean
from ranger_nn.keras import namespace as xp
from ranger_nn.keras.layers.aggregated import Aggregated
from ranger_nn.keras.layers.clusters import masked, put, taken
from ranger_nn.keras.layers.looped import looped
from ranger_nn.layers.clusters import Routes, check_join, check_kept
from ranger_nn.layers.regional import Result, piecewise, reduce


def clustered(layer: Aggregated, x: Any, present: Any, mask: Any, training: bool) -> Any:
    """The layer's result on samples (batch, d) or tokens (batch, N, d)."""
    kind, over, clusters = layer.partition, layer.aggregator, layer.clusters
    assert clusters is not None
    check_join(kind, over, len(x.shape))
    routes = clusters.route(x, mask, sets=len(x.shape) == 3, separate=layer.locals is not None)
    rows = ops.reshape(x, (-1, x.shape[-1]))
    together = taken(rows, routes, zeros=kind.balanced)
    if training:
        clusters.follow(routes, together)
    there = _there(routes, x, present, mask)
    lead = ops.shape(x)[:-1]
    if layer.stacked is None and layer.locals is None and not kind.balanced:
        found = masked(rows if layer.local is None else layer.local(rows), routes.there)  # one network for all samples
        check_kept((0, *rows.shape[:1]), (0, *found.shape[:1]))
    else:
        y = _run(layer, together, routes, training)
        if kind.balanced and not isinstance(over, Stitch):
            return _over_sets(layer, y, routes, present)
        check_kept(routes.shape, y.shape)
        found = put(y, routes)
    found = ops.cast(found, layer.compute_dtype)
    if isinstance(over, Stitch):
        found = found if there is None else masked(found, ops.reshape(there, (-1,)))
        return ops.reshape(found, (*lead, *found.shape[1:]))
    return _over_tokens(layer, ops.reshape(found, (*lead, *found.shape[1:])), routes, there)


def _run(layer: Aggregated, together: Any, routes: Routes, training: bool) -> Any:
    """Local results (*routes.shape, ...), or (regions, batch, ...) of sets."""
    if layer.allowed is not None and not layer._shapes_only:
        place = f"{layer.name}, regions of {layer.partition}"
        return looped(layer, together, list(range(layer.partition.clusters)), routes.shape[1], place, training)
    if routes.owner is not None:
        return layer.stacked(together, ids=routes.owner)  # type: ignore[misc]
    return layer._run(together, list(range(layer.partition.clusters)))


def _there(routes: Routes, x: Any, present: Any, mask: Any) -> Any:
    """Samples that are there, and whose region is."""
    if present is None:
        return mask
    region = ops.reshape(routes.region, (ops.shape(x)[0], -1))
    there = ops.reshape(ops.take_along_axis(present, region, axis=1), ops.shape(x)[:-1])
    return there if mask is None else ops.logical_and(there, mask)


def _over_tokens(layer: Aggregated, y: Any, routes: Routes, there: Any) -> Any:
    """Reduction over the tokens (batch, N, ...) of all regions at once: merging in any grouping gives the same."""
    n = y.shape[1]
    result = Result(list(range(n)), ops.moveaxis(y, 1, 0))
    weights = layer._weights([result], None, numbers=False)
    if isinstance(layer.aggregator, WeightedMean) and weights is None:
        own = ops.take(layer._region_weights(y.dtype), routes.region, axis=0)
        weights = [ops.transpose(ops.reshape(own, (-1, n)))]
    over: Any = layer.aggregator
    return reduce(xp, over, [result], weights, there)


def _over_sets(layer: Aggregated, y: Any, routes: Routes, present: Any) -> Any:
    """Join of the regions' own results (regions, batch, ...); regions without a token are absent."""
    clusters, _, capacity = routes.shape
    y = ops.cast(y, layer.compute_dtype)
    loads = None
    if routes.used is not None:
        loads = ops.sum(ops.cast(ops.reshape(routes.used, (clusters, -1, capacity)), y.dtype), axis=2)
        some = ops.transpose(loads) > 0
        present = some if present is None else ops.logical_and(present, some)
    over, result = layer.aggregator, Result(list(range(clusters)), y)
    if isinstance(over, Stitch | Concat | Call):
        return piecewise(xp, over, [result], None, present)
    weights = layer._weights([result], None, numbers=False)
    if isinstance(over, WeightedMean) and weights is None:
        own = layer._region_weights(y.dtype)[:, None]
        weights = [own if loads is None or isinstance(over.weights, tuple) else own * loads]
    return reduce(xp, over, [result], weights, present)
