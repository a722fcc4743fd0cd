"""`ClusteredAttention` for Keras 3: dense attention inside balanced K-means regions of tokens, all regions in one call."""

from __future__ import annotations

from math import sqrt
from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.errors import InputError, PartitionError
from ranger_nn.keras import namespace as xp
from ranger_nn.layers.routing import balanced_slots, check_attention, check_capacity, moved_centres
from ranger_nn.partition.config import from_config, to_config
from ranger_nn.partition.kmeans import KMeans

FAR = -1e9


@keras.saving.register_keras_serializable(package="ranger_nn")
class ClusteredAttention(keras.layers.Layer):
    """Multi-head self-attention inside balanced K-means regions of the tokens.

    Cost N * capacity instead of N * N. With one region it is full attention; an approximation otherwise.

    Args:
        heads: attention heads; they divide the width of the tokens.
        partition: `KMeans(regions, balanced=True)`; its centres, one set for each head, follow the keys in training by a
            moving average (`update="ema"`) or stay ("none").
        summaries: add each other region's mean key and value for all queries, weighted by its number of keys.
        features: width of the tokens; None: taken from the first input.
        use_bias: biases in the projections.

    Shapes:
        x (batch, N, features) -> (batch, N, features). N must be known when the layer is called.

    Raises:
        PartitionError (a ValueError): heads that do not divide the width, a partition that is not balanced, a
            capacity too small, `causal=True`.

    Source: Roy et al. 2021, Routing Transformer; Vyas et al. 2020, Fast Transformers with Clustered Attention.
    """

    def __init__(
        self,
        heads: int,
        partition: KMeans,
        *,
        features: int | None = None,
        summaries: bool = False,
        use_bias: bool = True,
        causal: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_attention(heads, partition, heads if features is None else features, causal)
        self.heads, self.partition, self.features = heads, partition, features
        self.summaries, self.use_bias = summaries, use_bias
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        """Projections and centres."""
        width = int(shape[-1]) if self.features is None else self.features
        if width != shape[-1]:
            raise InputError(f"ClusteredAttention was made for {width} features; the input has shape {tuple(shape)}")
        check_attention(self.heads, self.partition, width, False)
        if shape[1] is None:
            raise PartitionError(
                f"ClusteredAttention needs a known number of tokens; the input has shape {tuple(shape)}"
            )
        self.project = keras.layers.Dense(3 * width, use_bias=self.use_bias, dtype=self.dtype_policy, name="project")
        self.out = keras.layers.Dense(width, use_bias=self.use_bias, dtype=self.dtype_policy, name="out")
        self.project.build(shape)
        self.out.build(shape)
        self.centres = self.add_weight(
            shape=(self.heads, self.partition.clusters, width // self.heads),
            initializer=keras.initializers.RandomNormal(1.0, seed=self.partition.seed),
            trainable=False,
            name="centres",
        )
        self.built = True

    def call(self, x: Any, mask: Any = None, training: bool = False) -> Any:
        """Attention, then the output projection.

        Args:
            x: (batch, N, features).
            mask: (batch, N) bool, True for tokens that are there.
            training: centres follow.
        """
        q, k, v = self._heads(x)
        y = self._attend(q, k, v, mask, training and self.partition.update == "ema")
        y = ops.transpose(ops.reshape(y, (-1, self.heads, *y.shape[1:])), (0, 2, 1, 3))
        return self.out(ops.reshape(y, (-1, x.shape[1], self.heads * y.shape[-1])))

    def _heads(self, x: Any) -> tuple[Any, Any, Any]:
        """q, k, v (batch * heads, N, d)."""
        made = ops.reshape(self.project(x), (-1, x.shape[1], 3, self.heads, x.shape[-1] // self.heads))
        made = ops.reshape(ops.transpose(made, (2, 0, 3, 1, 4)), (3, -1, x.shape[1], x.shape[-1] // self.heads))
        return made[0], made[1], made[2]

    def _attend(self, q: Any, k: Any, v: Any, mask: Any, follow: bool) -> Any:
        regions, n, width = self.partition.clusters, q.shape[1], q.shape[2]
        capacity = self.partition.capacity or -(-n // regions)
        check_capacity(n, regions, capacity)
        filling = regions * capacity - n
        there = None
        if filling or mask is not None:
            there = ops.ones_like(q[:, :, 0], dtype="bool") if mask is None else ops.repeat(mask, self.heads, axis=0)
            there = ops.pad(there, ((0, 0), (0, filling)))
            q, k, v = (ops.pad(t, ((0, 0), (0, filling), (0, 0))) for t in (q, k, v))
        slots = [ops.stop_gradient(balanced_slots(xp, self._scores(t), capacity, there)) for t in (q, k)]
        sources = [ops.argsort(s, axis=1) for s in slots]
        a, b, c = (
            ops.reshape(_taken(t, sources[i]), (-1, regions, capacity, width)) for t, i in ((q, 0), (k, 1), (v, 1))
        )
        inside = (
            None
            if there is None
            else ops.reshape(ops.take_along_axis(there, sources[1], axis=1), (-1, regions, capacity))
        )
        if follow:
            self._follow(b, inside)
        y = _taken(ops.reshape(self._inside(a, b, c, inside), (-1, regions * capacity, width)), slots[0])
        if there is not None:
            y = ops.where(there[..., None], y, ops.zeros_like(y))
        return y[:, :n]

    def _scores(self, t: Any) -> Any:
        """How much each token points to each centre: (batch * heads, N, regions), float32."""
        along = ops.normalize(ops.stop_gradient(ops.cast(t, "float32")), axis=-1)
        split = ops.reshape(along, (-1, self.heads, *along.shape[1:]))
        centres = ops.transpose(ops.normalize(ops.cast(self.centres, "float32"), axis=-1), (0, 2, 1))
        return ops.reshape(ops.matmul(split, centres), (-1, along.shape[1], self.partition.clusters))

    def _inside(self, q: Any, k: Any, v: Any, there: Any) -> Any:
        """Attention of each region: q, k, v (groups, regions, capacity, d), there (groups, regions, capacity)."""
        regions = self.partition.clusters
        scale = ops.cast(1 / sqrt(q.shape[-1]), q.dtype)
        scores = ops.cast(ops.matmul(q * scale, ops.transpose(k, (0, 1, 3, 2))), "float32")
        if there is not None:
            scores = scores + ops.where(there, 0.0, FAR)[:, :, None]
        if not self.summaries:
            y = ops.matmul(ops.cast(ops.softmax(scores), v.dtype), v)
            return y if there is None else ops.where(ops.any(there, axis=-1)[:, :, None, None], y, ops.zeros_like(y))
        weight = ops.ones_like(k[..., 0]) if there is None else ops.cast(there, k.dtype)
        count = ops.sum(weight, axis=-1)
        means = [
            ops.sum(weight[..., None] * t, axis=2) / ops.maximum(count, ops.ones_like(count))[..., None] for t in (k, v)
        ]
        others = ops.cast(ops.einsum("grcd,gsd->grcs", q * scale, means[0]), "float32")
        bias = ops.where(count > 0, ops.log(ops.maximum(ops.cast(count, "float32"), 1.0)), FAR)
        others = (
            others + bias[:, None, None] + ops.convert_to_tensor(np.eye(regions, dtype="float32") * FAR)[None, :, None]
        )
        shares = ops.cast(ops.softmax(ops.concatenate([scores, others], axis=-1)), v.dtype)
        own, rest = shares[..., : k.shape[2]], shares[..., k.shape[2] :]
        return ops.matmul(own, v) + ops.einsum("grcs,gsd->grcd", rest, means[1])

    def _follow(self, k: Any, there: Any) -> None:
        """Moving average of the directions of each region's keys; regions without keys begin at the farthest ones."""
        along = ops.normalize(ops.stop_gradient(ops.cast(k, "float32")), axis=-1)
        weight = ops.ones_like(along[..., :1]) if there is None else ops.cast(there, "float32")[..., None]
        regions, capacity, width = along.shape[1:]
        along = ops.reshape(along * weight, (-1, self.heads, regions, capacity, width))
        counts = ops.sum(ops.reshape(weight, (-1, self.heads, regions, capacity, 1)), axis=(0, 3))
        centres = ops.cast(self.centres, "float32")
        apart = ops.sum(along * ops.normalize(centres, axis=-1)[None, :, :, None], axis=-1)
        apart = ops.where(ops.sum(ops.square(along), axis=-1) > 0, apart, 2 * ops.ones_like(apart))
        apart = ops.reshape(ops.transpose(apart, (1, 0, 2, 3)), (self.heads, -1))
        far = ops.top_k(-apart, regions)[1]
        tokens = ops.reshape(ops.transpose(along, (1, 0, 2, 3, 4)), (self.heads, -1, width))
        moved = moved_centres(
            xp, centres, ops.sum(along, axis=(0, 3)), counts, self.partition.decay, _taken(tokens, far)
        )
        self.centres.assign(ops.normalize(moved, axis=-1))

    def adapt(self, data: Any) -> None:
        """Put the centres where K-means finds the directions of the keys and queries of `data` (batch, N, features).

        Raises:
            InputError: NaN or infinite numbers, fewer tokens than regions.
        """
        data = np.asarray(data)
        if not np.isfinite(data).all():
            raise InputError(
                f"adapt takes finite tokens; {int((~np.isfinite(data)).sum())} of {data.size} numbers are not"
            )
        if not self.built:
            self.build(data.shape)
        q, k, _ = (ops.convert_to_numpy(ops.cast(t, "float32")) for t in self._heads(ops.convert_to_tensor(data)))
        fitted = []
        for h in range(self.heads):
            both = np.concatenate([t[h :: self.heads].reshape(-1, t.shape[-1]) for t in (q, k)])
            centres = self.partition.fit(both / np.maximum(np.linalg.norm(both, axis=-1, keepdims=True), 1e-12))
            fitted.append(centres / np.maximum(np.linalg.norm(centres, axis=-1, keepdims=True), 1e-12))
        self.centres.assign(np.stack(fitted).astype("float32"))

    def compute_output_shape(self, shape: Any) -> Any:
        """The input's."""
        return shape

    def get_config(self) -> dict[str, Any]:
        """Plain data."""
        own = {"heads": self.heads, "partition": to_config(self.partition), "features": self.features}
        return {**super().get_config(), **own, "summaries": self.summaries, "use_bias": self.use_bias}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ClusteredAttention:
        """The layer that `get_config` described."""
        return cls(**{**config, "partition": from_config(config["partition"], {"KMeans": KMeans})})


def _taken(x: Any, order: Any) -> Any:
    """x[g, order[g]] of (groups, tokens, d)."""
    return ops.take_along_axis(x, order[..., None], axis=1)
