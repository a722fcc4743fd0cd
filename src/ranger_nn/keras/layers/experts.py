"""`RegionExperts` for Keras 3: K-means regions of samples, a network for each, and each sample through its own only."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from ranger_nn.errors import PartitionError
from ranger_nn.keras.layers.clusters import Clusters, put, taken
from ranger_nn.keras.layers.stacked import Stacked, Untracked, has_state
from ranger_nn.layers.clusters import check_experts, check_kept, check_samples
from ranger_nn.partition.config import from_config, to_config
from ranger_nn.partition.kmeans import KMeans


@keras.saving.register_keras_serializable(package="ranger_nn")
class RegionExperts(keras.layers.Layer):
    """Samples are routed to the nearest centre, and each goes through the network of that region.

    The networks' weights are stacked (regions, ...); samples are brought together by region and all networks run in
    batched calls (`keras.ops.vectorized_map`), never in a loop over regions. Each sample's result and gradients are
    those of its own network applied to it.

    Args:
        partition: `KMeans(regions)`. Unbalanced, no sample is dropped whatever the loads, and shapes are static all the
            same; `balanced=True`: each region takes at most `capacity` samples of a batch, or tokens of a sequence,
            those that do not fit go to the next region (samples of a batch that TensorFlow does not know when it traces
            need `capacity`; one too small fails when it runs). Its `update` moves the centres in training: "ema", "gradient" (a term
            in `losses`) or "none".
        local: the network of a region, samples (n, d) in and (n, ...) out, each sample by itself; one for each region,
            each initialised as a new layer of `local`'s configuration. No state (BatchNormalization, Dropout), no
            recurrent layers.
        features: d; None: that of the first input.

    Shapes:
        x (batch, d) -> (batch, ...); x (batch, N, d) -> (batch, N, ...). A mask of samples keeps the absent ones out.

    Raises:
        PartitionError (a ValueError): a partition that is no KMeans, a capacity too small, a local network that cannot
            be stacked or does not keep its samples.
        InputError (a ValueError): NaN in `adapt`; not in inputs, whose graphs have nowhere to say so.

    Source: Jacobs, Jordan, Nowlan & Hinton 1991, Adaptive mixtures of local experts; Shazeer et al. 2017, Outrageously
    large neural networks, section 2 (each sample computes its own experts only; here one, without a gate); Roy et al.
    2021, Routing Transformer, section 4.1 (K-means routing trained online); Gale et al. 2022, MegaBlocks (no drops).
    """

    def __init__(self, partition: KMeans, local: Any, *, features: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_experts(partition, local, isinstance(local, keras.layers.Layer), "keras.layers.Layer")
        if has_state(local):
            raise PartitionError(
                "RegionExperts runs all regions in one call, and its local network has state or recurrent layers, which "
                "vectorized_map does not take: leave them out (LayerNormalization in place of BatchNormalization), or "
                "use RegionalAggregator, which runs one layer after the other"
            )
        self.partition, self.features = partition, features
        self._local = Untracked(local)
        self.clusters = Clusters(partition, dtype=self.dtype_policy)
        self.stacked = Stacked(local, partition.clusters, dtype=local.dtype_policy)
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        """Centres and networks."""
        check_samples(self.partition, shape, self.features)
        if not self.clusters.built:
            self.clusters.build(shape)
        self.stacked.build((None, shape[-1]))
        self.built = True

    def call(self, x: Any, mask: Any = None, training: bool = False) -> Any:
        """Each sample through the network of its region.

        Args:
            x: (batch, d) or (batch, N, d).
            mask: (batch,) or (batch, N) bool, True for samples that are there; the others give zero and move nothing.
            training: the centres follow.
        """
        routes = self.clusters.route(x, mask)
        together = taken(ops.reshape(x, (-1, x.shape[-1])), routes, zeros=self.partition.balanced)
        if training:
            self.clusters.follow(routes, together)
        y = self.stacked(together, ids=routes.owner)
        check_kept(routes.shape, y.shape)
        found = ops.cast(put(y, routes), self.compute_dtype)
        return ops.reshape(found, (*ops.shape(x)[:-1], *found.shape[1:]))

    def adapt(self, data: Any) -> None:
        """Put the centres where K-means finds those of `data` (samples, d) or (batch, N, d); see `KMeans.fit`."""
        self.clusters.adapt(data)

    def compute_output_shape(self, shape: Any) -> Any:
        """The samples' dimensions, and the networks'."""
        return (*shape[:-1], *self._local.held.compute_output_shape((None, shape[-1]))[1:])

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The input's."""
        return mask

    def get_config(self) -> dict[str, Any]:
        """Plain data."""
        local = keras.saving.serialize_keras_object(self._local.held)
        own = {"partition": to_config(self.partition), "local": local, "features": self.features}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RegionExperts:
        """The layer that `get_config` described."""
        partition = from_config(config["partition"], {"KMeans": KMeans})
        local = keras.saving.deserialize_keras_object(config["local"])
        return cls(**{**config, "partition": partition, "local": local})
