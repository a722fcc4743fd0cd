"""`RegionalAggregator` for Keras 3: variables, the local network on batches of regions, and the loop under `memory`.

What is cut and joined is `ranger_nn.layers.regional`'s, called with `ranger_nn.keras.namespace`. The local network
runs on a group of regions of one shape as in PyTorch: folded into the batch (shared), over stacked weights
(`per_region`), or one layer after the other (a list). Under `memory` a group is a loop of the back end
(`keras.ops.scan`), whose body is computed again in backward: `ranger_nn.keras.layers.looped`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
from keras import ops

from ranger_nn.aggregate.names import aggregator as by_name
from ranger_nn.aggregate.pieces import Call, Concat, Stitch
from ranger_nn.aggregate.pooling import Softmax, WeightedMean
from ranger_nn.errors import PartitionError
from ranger_nn.keras import namespace as xp
from ranger_nn.keras.layers.clustered import clustered
from ranger_nn.keras.layers.clusters import Clusters
from ranger_nn.keras.layers.configuration import configured, restored
from ranger_nn.keras.layers.looped import looped
from ranger_nn.keras.layers.pure import Recomputed
from ranger_nn.keras.layers.stacked import Stacked, Untracked, has_state
from ranger_nn.layers.regional import Group, Layout, Result, piecewise, reduce, without_absent
from ranger_nn.partition.blocks import Blocks
from ranger_nn.partition.grid import Grid
from ranger_nn.partition.kmeans import KMeans
from ranger_nn.partition.time import TimeSlices
from ranger_nn.planning.budget import parse_memory


@keras.saving.register_keras_serializable(package="ranger_nn")
class RegionalAggregator(keras.layers.Layer):
    """Cut the input in regions, run a local network on each, join the results.

    Args:
        partition: `Grid`, `TimeSlices`, `Blocks`, `KMeans` (of `ranger_nn`), or a callable that gives the list of parts.
        aggregator: "sum", "mean", "weighted_mean", "max", "min", "logsumexp", "softmax", "moments", "stitch", "concat",
            an object of `ranger_nn.aggregate`, or a callable that takes the list of the regions' results. With a
            callable partition and no `local`, a callable is the local network and the parts are summed.
        local: layer or model applied to a region: (batch, ...) in, (batch, ...) out. One for all regions, a list with
            one for each, or None for the region itself.
        per_region: one set of weights for each region, each initialised as a new layer of `local`'s configuration.
        coordinates: with a `Grid`, also give the local network each element's position in its region, -1 to 1,
            as one more feature for each axis that is cut.
        memory: run the regions one after the other in as large groups as this allows (bytes, or text such as
            "512MB"), and compute each group again in backward. Bytes are estimated from the shapes of the
            layers' outputs, for the batch of the call (a batch that is not known counts as one). Not under
            `jit_compile=True` on TensorFlow, whose XLA has no gradient of such a loop.

    Shapes:
        x (batch, ...). A `Grid` cuts the spatial axes of the data format, `TimeSlices` axis 1, `Blocks` the last, unless
        they say otherwise. A mask of time steps reaches the local network; slices that are masked throughout are
        absent.
        A `KMeans` takes samples (batch, d) or tokens (batch, N, d), each to the region of its nearest centre; `stitch`
        puts results back to their samples. Unbalanced, the local network is given samples (n, d) of a region, each by
        itself, and a reduction of tokens is over all of them, each with its region's weight. Balanced, it is given
        (batch, capacity, d) of tokens, sets in any order with zeros in places that no token takes, and every aggregator
        joins the regions; of samples (batch, d) it is given (capacity, d), and there is only `stitch`, as a sample has
        one region. Unbalanced, a list of networks (or one with state) computes each on every sample. A mask of samples
        keeps the absent ones out. Centres: `adapt`, and the partition's `update` in training.

    Raises:
        PartitionError (a ValueError): more regions than elements, results that the aggregator cannot join, unknown
            names.
        BudgetError: a single region does not fit into `memory`.

    Source: the article's RegionalAggregator; weights and scores as in `ranger_nn.aggregate.pooling`.
    """

    def __init__(
        self,
        partition: Any,
        aggregator: Any = "sum",
        local: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
        *,
        per_region: bool = False,
        coordinates: bool = False,
        memory: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.described = isinstance(partition, Grid | TimeSlices | Blocks)
        of_samples = isinstance(partition, KMeans)
        if isinstance(partition, type) or not (self.described or of_samples or callable(partition)):
            raise PartitionError(
                f"a partition is a Grid, TimeSlices, Blocks or KMeans, or a callable that gives parts; got {partition!r}"
            )
        if of_samples and coordinates:
            raise PartitionError(f"coordinates=True needs a Grid; got {partition}")
        if of_samples and memory is not None and not partition.balanced:
            raise PartitionError(
                f"memory= runs a known number of regions of one size; those of {partition} differ. Use "
                "KMeans(..., balanced=True), or leave memory out"
            )
        given = {"aggregator": aggregator, "local": local, "per_region": per_region}
        self._given = Untracked(given | {"coordinates": coordinates, "memory": memory})
        if not self.described and local is None and callable(aggregator):
            aggregator, local = "sum", aggregator
        self.partition = partition
        self.aggregator = by_name(aggregator)
        self.join = aggregator if isinstance(aggregator, keras.layers.Layer) else None
        self.coordinates = coordinates
        self.allowed = parse_memory(memory)
        self.regions: int | None = partition.count if self.described or of_samples else None
        self.clusters = Clusters(partition, dtype=self.dtype_policy) if of_samples else None
        self.supports_masking = True
        self._shapes_only = False
        self._set_local(local, per_region)
        self._check_weights()

    def _set_local(self, local: Any, per_region: bool) -> None:
        several = isinstance(local, list | tuple)
        if several and self.regions is not None and len(local) != self.regions:
            raise PartitionError(
                f"one local network for each region: {self.partition} has {self.regions} regions, local has {len(local)} "
                "networks"
            )
        if per_region and (several or not isinstance(local, keras.layers.Layer) or self.regions is None):
            raise PartitionError(
                f"per_region=True needs one layer and a partition with a known number of regions; got local="
                f"{type(local).__name__} and {self.partition}. Give counts as in Grid(2, 2)"
            )
        if per_region and has_state(local):
            local = [type(local).from_config(local.get_config()) for _ in range(self.regions or 0)]
        self.stacked = Stacked(local, self.regions or 0) if per_region and not isinstance(local, list) else None
        self.locals = list(local) if isinstance(local, list | tuple) else None
        self.local = None if self.stacked is not None or self.locals is not None else local

    def _check_weights(self) -> None:
        over = self.aggregator
        if not isinstance(over, WeightedMean) or over.weights in ("size", "predicted"):
            return
        if self.regions is None:
            raise PartitionError(
                f"weights for each region need a known number of regions; {self.partition} has none. Use "
                'WeightedMean("size"), WeightedMean("predicted"), or counts as in Grid(2, 2)'
            )
        if isinstance(over.weights, tuple) and len(over.weights) != self.regions:
            raise PartitionError(
                f"{len(over.weights)} weights were given for {self.regions} regions of {self.partition}"
            )

    # ------------------------------------------------------------------------------------ build

    def build(self, shape: Any) -> None:
        """Build the local networks on the shape of a region, and what weights and scores need."""
        if self.clusters is not None:
            self._build_clusters(shape)
        elif self.described:
            self._build_local(shape)
        over = self.aggregator
        if isinstance(over, WeightedMean) and over.weights == "learned":
            self.log_weight = self.add_weight(shape=(self.regions,), initializer="zeros", name="log_weight")
        if isinstance(over, Softmax) or (isinstance(over, WeightedMean) and over.weights == "predicted"):
            self._build_score(over if isinstance(over, Softmax) else Softmax(), shape)
        self.built = True

    def _build_clusters(self, shape: Any) -> None:
        if self.clusters is not None and not self.clusters.built:
            self.clusters.build(shape)
        self._build_local(shape)

    def _build_local(self, shape: Any) -> None:
        self._one_region(shape)  # refuses shapes that cannot be cut, even where nothing is to be built
        regions = [(layer, self._one_region(shape)) for layer in (self.local, self.stacked)]
        regions += [(layer, self._one_region(shape, i)) for i, layer in enumerate(self.locals or [])]
        for layer, one in regions:
            if isinstance(layer, keras.layers.Layer) and not layer.built:
                layer.build(one)

    def _build_score(self, kind: Softmax, shape: Any) -> None:
        self.hidden = self.gate = None
        if kind.hidden is not None:
            self.hidden = keras.layers.Dense(kind.hidden, activation="tanh", dtype=self.dtype_policy)
            self.gate = keras.layers.Dense(kind.hidden, "sigmoid", dtype=self.dtype_policy) if kind.gated else None
        self.score = keras.layers.Dense(1, use_bias=False, dtype=self.dtype_policy)
        features = self._result_features(shape)
        for layer in (self.hidden, self.gate):
            if layer is not None:
                layer.build((None, None, features))
        self.score.build((None, None, kind.hidden or features))

    def _result_features(self, shape: Any) -> int:
        """Width of a region's result."""
        if self.described or self.clusters is not None:
            result = self._result_shape(self._one_region(shape))
        else:
            part = keras.layers.Lambda(lambda x: self.partition(x)[0]).compute_output_shape(shape)
            result = self._result_shape(part)
        if len(result) == 1:
            return 1
        first = keras.config.image_data_format() == "channels_first" and len(result) > 3
        return int(result[1 if first else -1])

    def _one_region(self, shape: Any, index: int = 0) -> tuple[int | None, ...]:
        """What the local network of a region is given, batch first."""
        if not isinstance(self.partition, KMeans):
            return self._region_shape(self._layout(shape), shape, index)
        if len(shape) == 2 or not self.partition.balanced:
            return (None, shape[-1])
        if shape[1] is None:
            raise PartitionError(f"{self.partition} needs a known number of tokens; the input has shape {tuple(shape)}")
        return (shape[0], self.partition.capacity or -(-shape[1] // self.partition.clusters), shape[-1])

    def _region_shape(self, layout: Layout, shape: Any, index: int) -> tuple[int | None, ...]:
        one = list(shape)
        for axis, (a, b) in zip(layout.axes, layout.regions[index].read):
            one[axis] = b - a
        if self.coordinates:
            one[self._feature_axis(layout)] += len(layout.axes)
        return tuple(one)

    # ------------------------------------------------------------------------------------- call

    def call(self, x: Any, present: Any = None, mask: Any = None, training: bool = False) -> Any:
        """Join of the local results.

        Args:
            x: (batch, ...).
            present: (batch, regions) bool: False for regions that are absent and must not count; None: all count.
            mask: (batch, time) bool, as Keras's masking layers give it; with `KMeans` (batch,) or (batch, N), samples.
            training: with `KMeans`, the centres follow.
        """
        if self.clusters is not None:
            return clustered(self, x, present, mask, training)
        layout = self._layout(x.shape) if self.described else None
        # the local networks have policies of their own; the result has this layer's
        results = [Result(r.ids, ops.cast(r.y, self.compute_dtype)) for r in self._results(x, mask, training)]
        if present is None and mask is not None and layout is not None and layout.axes == (1,):
            parts = [ops.any(mask[:, a:b], axis=1) for r in layout.regions for (a, b) in r.own[:1]]
            present = ops.stack(parts, axis=1)
        over = self.aggregator
        if isinstance(over, Stitch | Concat | Call):
            return piecewise(xp, over, results, layout, present)
        return reduce(xp, over, results, self._weights(without_absent(xp, results, present), layout), present)

    def _layout(self, shape: Any) -> Layout:
        first = 2 if keras.config.image_data_format() == "channels_first" and len(shape) > 3 else 1
        return Layout.of(self.partition, tuple(shape), range(first, first + (self.partition.rank or 1)))

    def _feature_axis(self, layout: Layout) -> int:
        return 1 if min(layout.axes) == 2 else -1

    def _results(self, x: Any, mask: Any, training: bool) -> list[Result]:
        if not self.described:
            return self._part_results(x, training)
        layout = self._layout(x.shape)
        if self.allowed is None or self._shapes_only:
            return [self._group(x, layout, g, mask) for g in layout.groups]
        return [self._looped(x, layout, g, mask, training) for g in layout.groups]

    def _part_results(self, x: Any, training: bool) -> list[Result]:
        parts = list(self.partition(x))
        if not parts:
            raise PartitionError(f"the partition {self.partition} gave no parts for an input of shape {tuple(x.shape)}")
        if self.locals is not None and len(self.locals) != len(parts):
            raise PartitionError(f"one local network for each part: {len(parts)} parts, {len(self.locals)} networks")
        results = []
        for i, part in enumerate(parts):

            def run(x: Any, i: int = i) -> Any:
                return self._run(x, [i], training=training)

            network = self.local if self.locals is None else self.locals[i]
            again = run if self.allowed is None or self._shapes_only else partial(Recomputed(network), run)
            results.append(Result([i], again(ops.expand_dims(part, 0))))
        return results

    def _group(self, x: Any, layout: Layout, group: Group, mask: Any) -> Result:
        taken = self._placed(layout.gather(xp, x, group), layout, group)
        masks = self._masks(layout, group, mask)
        if masks is None:
            return Result(group.ids, self._run(taken, group.ids))
        return Result(group.ids, self._run(taken, group.ids, mask=ops.reshape(masks, (-1, masks.shape[-1]))))

    def _masks(self, layout: Layout, group: Group, mask: Any) -> Any:
        """Masks of the regions' steps for the local network, (regions, batch, time); None: it takes none."""
        if mask is None or layout.axes != (1,) or not _takes_mask(self.local):
            return None
        return xp.stack([mask[:, a:b] for r in group.regions for (a, b) in r.read[:1]], axis=0)

    def _placed(self, stacked: Any, layout: Layout, group: Group) -> Any:
        """With `coordinates`: each element's position as more features."""
        if not self.coordinates:
            return stacked
        feature = self._feature_axis(layout)
        template = stacked[..., :1] if feature == -1 else stacked[:, :, :1]
        maps = []
        for axis, rows in zip(layout.axes, layout.coordinates(group)):
            shape = [1] * len(stacked.shape)
            shape[0], shape[axis + 1] = len(rows), len(rows[0])
            maps.append(ops.reshape(ops.convert_to_tensor(rows, dtype=stacked.dtype), shape) + ops.zeros_like(template))
        return ops.concatenate([stacked, *maps], axis=-1 if feature == -1 else 2)

    def _run(self, stacked: Any, ids: list[int], **kwargs: Any) -> Any:
        """Local network on stacked regions (regions, batch, ...); `kwargs`: mask, and training outside of `call`."""
        if self.stacked is not None:
            return self.stacked(stacked, ids=ids)
        if self.locals is not None:
            return _stack([_called(self.locals[i], stacked[k], kwargs) for k, i in enumerate(ids)], ids)
        if self.local is None:
            return stacked
        folded = _called(self.local, ops.reshape(stacked, (-1, *stacked.shape[2:])), kwargs)
        return ops.reshape(folded, (len(ids), -1, *folded.shape[1:]))

    def _looped(self, x: Any, layout: Layout, group: Group, mask: Any, training: bool) -> Result:
        """A group in a loop of the back end."""
        taken = self._placed(layout.gather(xp, x, group), layout, group)
        place = f"{self.name}, regions of {self.partition}"
        masks = self._masks(layout, group, mask)
        return Result(group.ids, looped(self, taken, group.ids, ops.shape(x)[0], place, training, masks))

    def _result_shape(self, region: Any) -> Any:
        """Shape of the local network's result for regions of this shape (batch first)."""
        layer = self.local if self.stacked is None else self.stacked.template.held
        layer = self.locals[0] if self.locals is not None else layer
        if layer is None:
            return region
        return (layer if isinstance(layer, keras.layers.Layer) else keras.layers.Lambda(layer)).compute_output_shape(
            region
        )

    # ---------------------------------------------------------------------------------- weights

    def _score_features(self, y: Any) -> Any:
        """(regions, batch, features) of results; what is more than a vector is averaged over the other axes."""
        if len(y.shape) == 2:
            return ops.expand_dims(y, -1)
        if len(y.shape) == 3:
            return y
        first = keras.config.image_data_format() == "channels_first" and len(y.shape) > 4
        return ops.mean(y, axis=tuple(range(3, len(y.shape)) if first else range(2, len(y.shape) - 1)))

    def _scores(self, y: Any) -> Any:
        features = self._score_features(y)
        hidden = features if self.hidden is None else self.hidden(features)
        return self.score(hidden if self.gate is None else hidden * self.gate(features))[..., 0]

    def _weights(self, results: Sequence[Result], layout: Layout | None, numbers: bool = True) -> list[Any] | None:
        """Weights or scores of each group; `numbers`: also those that do not come from the results."""
        over = self.aggregator
        if isinstance(over, Softmax):
            return [self._scores(r.y) for r in results]
        if not isinstance(over, WeightedMean):
            return None
        if over.weights == "predicted":
            return [ops.sigmoid(self._scores(r.y)) for r in results]
        if not numbers:
            return None
        return [ops.expand_dims(ops.take(self._own_weights(layout, r.y.dtype), r.ids, axis=0), 1) for r in results]

    def _region_weights(self, dtype: Any) -> Any:
        """Of each region of a `KMeans`, beside its number of samples: given, learned, or 1."""
        given = self.aggregator.weights if isinstance(self.aggregator, WeightedMean) else "size"
        if isinstance(given, tuple):
            return ops.convert_to_tensor(given, dtype=dtype)
        return ops.cast(ops.exp(self.log_weight), dtype) if given == "learned" else ops.ones((self.regions,), dtype)

    def _own_weights(self, layout: Layout | None, dtype: Any) -> Any:
        given = self.aggregator.weights if isinstance(self.aggregator, WeightedMean) else "size"
        if isinstance(given, tuple):
            return ops.convert_to_tensor(given, dtype=dtype)
        if layout is None:
            raise PartitionError('WeightedMean("size") needs a Grid, TimeSlices or Blocks; give the weights')
        share = ops.convert_to_tensor(layout.shares(), dtype=dtype)
        return share * ops.cast(ops.exp(self.log_weight), dtype) if given == "learned" else share

    # ------------------------------------------------------------------------------- good citizen

    def adapt(self, data: Any) -> None:
        """With `KMeans`: put the centres where K-means finds those of `data` (samples, d) or (batch, N, d).

        Raises:
            PartitionError: another partition.
            InputError: NaN or infinite numbers, fewer samples than clusters.
        """
        if self.clusters is None:
            raise PartitionError(f"adapt fits the centres of KMeans; {self.partition} follows from shapes")
        self.clusters.adapt(data)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Traced: nothing is computed. Sizes of the batch are made up there, so `memory` does not count."""
        self._shapes_only = True
        try:
            return keras.Operation.compute_output_spec(self, *args, **kwargs)
        finally:
            self._shapes_only = False

    def compute_output_shape(self, shape: Any) -> Any:
        """Shape of the result for an input of `shape`."""
        return self.compute_output_spec(keras.KerasTensor(shape, dtype=self.compute_dtype)).shape

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Stitched steps keep their mask."""
        return mask if isinstance(self.aggregator, Stitch) else None

    def get_config(self) -> dict[str, Any]:
        """Partition, aggregator and local networks as plain data."""
        plain = self.described or self.clusters is not None
        return {**super().get_config(), **configured(dict(self._given.held), self.partition, plain)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RegionalAggregator:
        """The layer that `get_config` described."""
        return cls(**restored(config))


def _called(local: Any, x: Any, kwargs: dict[str, Any]) -> Any:
    """Layers take `mask` and `training` always, functions never."""
    return local(x, **kwargs) if isinstance(local, keras.layers.Layer) else local(x)


def _takes_mask(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Layer) and "mask" in inspect.signature(layer.call).parameters


def _stack(results: Sequence[Any], ids: Sequence[int]) -> Any:
    if len({tuple(y.shape[1:]) for y in results}) > 1:
        raise PartitionError(
            "local networks of regions of one shape give results of one shape; got "
            + ", ".join(f"{tuple(y.shape)} for region {i}" for i, y in zip(ids, results))
        )
    return ops.stack(results, axis=0)
