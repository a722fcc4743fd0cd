"""Centres of K-means regions in Keras 3: routing of samples, bringing them together by region and back, training steps.

What is routed where is `ranger_nn.layers.clusters`'s, called with `ranger_nn.keras.namespace`; blocks follow from shapes,
so that graphs are static. Where the batch is not known when TensorFlow traces, sizes are tensors. Enter at `Clusters`.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.errors import PartitionError
from ranger_nn.keras import namespace as xp
from ranger_nn.layers.clusters import (
    Routes,
    balanced,
    block_count,
    block_size,
    check_mask,
    check_samples,
    filled,
    grouped,
    moved,
    nearness,
)
from ranger_nn.layers.routing import balanced_slots, check_capacity
from ranger_nn.partition.kmeans import KMeans


class Clusters(keras.layers.Layer):
    """The centres of a `KMeans`, and the way of samples to them.

    Centres (clusters, features) are a non-trainable variable, or with `update="gradient"` a trainable one. Until `adapt`
    they are normal random numbers by the partition's seed; with "ema" and "gradient" those to which nothing comes begin
    anew at samples.

    Args:
        partition: the regions.
    """

    def __init__(self, partition: KMeans, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.partition = partition

    def build(self, shape: Any) -> None:
        """The centres, for samples of `shape`."""
        check_samples(self.partition, shape, None)
        clusters = self.partition.clusters
        self.centres = self.add_weight(
            shape=(clusters, int(shape[-1])),
            initializer=keras.initializers.RandomNormal(stddev=1.0, seed=self.partition.seed),
            trainable=self.partition.update == "gradient",
            autocast=False,
            name="centres",
        )
        self.unseen = self.add_weight(
            shape=(clusters,), initializer="zeros", trainable=False, autocast=False, name="unseen"
        )
        self.built = True

    def route(self, x: Any, mask: Any, sets: bool = False, separate: bool = False) -> Routes:
        """Where each sample goes.

        Args:
            x: (batch, d) or (batch, N, d).
            mask: (batch,) or (batch, N) bool, or None.
            sets: balanced tokens of one region stay apart by sequence.
            separate: unbalanced, one block for each region, with room for all samples.

        Raises:
            InputError: another shape. NaN is not looked for: a graph has nowhere to say so.
            PartitionError: balanced, and a capacity too small, or none for a batch that is not known.
        """
        check_samples(self.partition, x.shape, self.centres.shape[1])
        if mask is not None and None not in (*mask.shape, *x.shape):
            check_mask(mask, x.shape)
        rows = ops.reshape(ops.stop_gradient(ops.cast(x, self.centres.dtype)), (-1, x.shape[-1]))
        near = nearness(xp, rows, ops.stop_gradient(ops.convert_to_tensor(self.centres)), self.partition.balanced)
        if self.partition.balanced:
            return self._balanced(near, x, mask, sets)
        n, clusters = ops.shape(near)[0], self.partition.clusters
        size = n if separate else block_size(n, clusters)
        there = None if mask is None else ops.reshape(mask, (-1,))
        region = ops.cast(ops.argmax(near, axis=1), "int32")
        return grouped(xp, region, there, n, clusters, size, None if separate else block_count(n, clusters, size))

    def _balanced(self, near: Any, x: Any, mask: Any, sets: bool) -> Routes:
        clusters, sizes = self.partition.clusters, ops.shape(x)
        groups, rows = (sizes[0], sizes[1]) if len(x.shape) == 3 else (1, sizes[0])
        if not isinstance(rows, int) and self.partition.capacity is None:
            raise PartitionError(
                f"{self.partition} shares out a known number of samples; the input has shape {tuple(x.shape)} when it is "
                "traced. Give capacity=..., at least batch / clusters, or keras.Input(..., batch_size=...)"
            )
        capacity = self.partition.capacity or -(-rows // clusters)
        if isinstance(rows, int):
            check_capacity(rows, clusters, capacity)
        near = ops.reshape(near, (groups, rows, clusters))
        there = None if mask is None else ops.reshape(mask, (groups, rows))
        if there is not None or not isinstance(rows, int) or clusters * capacity != rows:
            near, there = filled(xp, near, there, rows, capacity)
        slots = balanced_slots(xp, near, capacity, there)
        return balanced(xp, slots, there, groups, rows, capacity, clusters, sets)

    def follow(self, routes: Routes, together: Any) -> None:
        """A training step of the centres on samples by region.

        "ema": Lloyd's step as a moving average (Roy et al. 2021, section 4.1). "gradient": adds to the losses half the
        squared distance of each centre to the mean of its samples, the quantisation error of each region divided by its
        load (Bottou & Bengio 1995, K-means as descent on the quantisation error).
        """
        update = self.partition.update
        if update == "none":
            return
        together = ops.stop_gradient(ops.cast(together, self.centres.dtype))
        width, blocks = together.shape[-1], self.partition.clusters if routes.owner is None else None
        lead = (-1, routes.shape[1]) if blocks is None else (blocks, -1)
        used = None if routes.used is None else ops.reshape(routes.used, lead)
        centres = ops.convert_to_tensor(self.centres)
        decay = self.partition.decay if update == "ema" else 0.0
        flat = ops.reshape(together, (*lead, width))
        target, unseen = moved(xp, flat, used, routes.owner, ops.stop_gradient(centres), self.unseen + 0, decay)
        self.unseen.assign(unseen)
        if update == "ema":
            self.centres.assign(target)
        else:
            self.add_loss(ops.sum(ops.square(centres - ops.stop_gradient(target))) / 2)

    def adapt(self, data: Any) -> None:
        """Put the centres where K-means finds those of `data` (..., d).

        Raises:
            InputError: NaN or infinite numbers, fewer samples than clusters, another d.
        """
        data = np.asarray(ops.convert_to_numpy(data) if ops.is_tensor(data) else data)
        check_samples(self.partition, data.shape, self.centres.shape[1] if self.built else None)
        if not self.built:
            self.build(data.shape)
        self.centres.assign(self.partition.fit(data.reshape(-1, data.shape[-1])).astype(self.centres.dtype))
        self.unseen.assign(np.zeros(self.unseen.shape))


def taken(x: Any, routes: Routes, zeros: bool) -> Any:
    """Rows (rows, d) by region: (*routes.shape, d); slots without a row of their own hold zeros, or some row."""
    y = ops.take(x, routes.take, axis=0)
    return ops.reshape(masked(y, routes.used) if zeros else y, (*routes.shape, x.shape[-1]))


def put(y: Any, routes: Routes) -> Any:
    """Slots (*routes.shape, ...) back to their rows: (rows, ...); zero for rows that are absent."""
    kept = y.shape[len(routes.shape) :]
    return masked(ops.take(ops.reshape(y, (-1, *kept)), routes.back, axis=0), routes.there)


def masked(y: Any, there: Any) -> Any:
    """`y` (n, ...), zero where `there` (n,) is False."""
    return y if there is None else ops.where(ops.reshape(there, (-1, *[1] * (len(y.shape) - 1))), y, ops.zeros_like(y))
