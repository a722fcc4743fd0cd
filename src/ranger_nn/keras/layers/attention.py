"""`ClusteredAttention` for Keras 3: dense attention inside balanced K-means regions of tokens, all regions in one call."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.errors import InputError, PartitionError
from ranger_nn.keras import namespace as xp
from ranger_nn.layers.routing import (
    balanced_slots,
    balanced_slots_now,
    check_attention,
    check_mask,
    moved_centres,
    tokens_of_region,
)
from ranger_nn.partition.config import from_config, to_config
from ranger_nn.partition.kmeans import KMeans

FAR = -1e9


@keras.saving.register_keras_serializable(package="ranger_nn")
class ClusteredAttention(keras.layers.Layer):
    """Multi-head self-attention inside balanced K-means regions of the tokens.

    Cost N * capacity instead of N * N. With one region it is full attention; an approximation otherwise.

    Args:
        heads: attention heads; they divide the width of the tokens.
        partition: `KMeans(regions, balanced=True)`; its centres, one set for each head, follow queries and keys in
            training by a moving average (`update="ema"`) or stay ("none").
        summaries: add each other region's mean key and value for all queries, weighted by its number of keys.
        features: width of the tokens; None: taken from the first input.
        use_bias: biases in the projections.

    Shapes:
        x (batch, N, features) -> (batch, N, features). N must be known when the layer is called.

    Raises:
        PartitionError (a ValueError): heads that do not divide the width, a partition that is not balanced, a
            capacity too small, more regions than tokens, `causal=True`.
        InputError (a ValueError): a mask of another shape or kind; NaN in `adapt`.

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
        if mask is not None:
            dtype = keras.backend.standardize_dtype(mask.dtype)
            batch = mask.shape[0] if x.shape[0] is None else x.shape[0]
            check_mask(tuple(mask.shape), (batch, x.shape[1]), dtype, dtype == "bool")
        q, k, v = self._heads(x)
        y = self._attend(q, k, v, mask, training and self.partition.update == "ema")
        y = ops.transpose(ops.reshape(y, (-1, self.heads, *y.shape[1:])), (0, 2, 1, 3))
        return self.out(ops.reshape(y, (-1, x.shape[1], self.heads * y.shape[-1])))

    def _heads(self, x: Any) -> tuple[Any, Any, Any]:
        """q, k, v (batch * heads, N, d)."""
        made = ops.reshape(self.project(x), (-1, x.shape[1], 3, self.heads, x.shape[-1] // self.heads))
        made = ops.reshape(ops.transpose(made, (2, 0, 3, 1, 4)), (3, -1, x.shape[1], x.shape[-1] // self.heads))
        q, k, v = ops.unstack(made, 3, axis=0)
        return q, k, v

    def _attend(self, q: Any, k: Any, v: Any, mask: Any, follow: bool) -> Any:
        regions, n, width = self.partition.clusters, q.shape[1], q.shape[2]
        capacity = tokens_of_region(n, regions, self.partition.capacity)
        filling = regions * capacity - n
        there = None
        if filling or mask is not None:
            there = ops.ones_like(q[:, :, 0], dtype="bool") if mask is None else ops.repeat(mask, self.heads, axis=0)
            there = ops.pad(there, ((0, 0), (0, filling)))
            q, k, v = (ops.pad(t, ((0, 0), (0, filling), (0, 0))) for t in (q, k, v))
        slots = [ops.stop_gradient(_slots(self._scores(t), capacity, there)) for t in (q, k)]
        slots = [ops.reshape(s, (-1, regions * capacity)) for s in slots]
        sources = [_inverse(s) for s in slots]
        a, b, c = (
            ops.reshape(_permuted(t, sources[i], slots[i]), (-1, regions, capacity, width))
            for t, i in ((q, 0), (k, 1), (v, 1))
        )
        here = [
            None if there is None else ops.reshape(ops.take_along_axis(there, s, axis=1), (-1, regions, capacity))
            for s in sources
        ]
        if follow:
            self._follow((a, b), here)
        y = ops.reshape(self._inside(a, b, c, here[1]), (-1, regions * capacity, width))
        y = _permuted(y, slots[0], sources[0])
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
        if not self.summaries:
            return _attention(q, k, v, there)
        regions = self.partition.clusters
        scale = ops.cast(1 / sqrt(q.shape[-1]), q.dtype)
        scores = ops.cast(ops.matmul(q * scale, ops.transpose(k, (0, 1, 3, 2))), "float32")
        if there is not None:
            scores = scores + ops.where(there, 0.0, FAR)[:, :, None]
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

    def _follow(self, tokens: Sequence[Any], here: Sequence[Any]) -> None:
        """Moving average of the directions of each region's queries and keys (Roy et al. 2021, section 4.1).

        Regions without any begin anew, at tokens far from their centres.
        """
        regions, width = self.partition.clusters, tokens[0].shape[-1]
        sides: list[Any] = []
        kinds: list[Any] = []
        for t, there in zip(tokens, here):
            along = ops.normalize(ops.stop_gradient(ops.cast(t, "float32")), axis=-1)
            weight = ops.ones_like(along[..., :1]) if there is None else ops.cast(there, "float32")[..., None]
            for made, a in ((sides, along), (kinds, weight)):
                split = ops.reshape(a, (-1, self.heads, *a.shape[1:]))
                made.append(ops.reshape(ops.transpose(split, (1, 2, 0, 3, 4)), (self.heads, regions, -1, a.shape[-1])))
        along, weight = ops.concatenate(sides, axis=2), ops.concatenate(kinds, axis=2)
        centres = ops.normalize(ops.cast(self.centres, "float32"), axis=-1)
        apart = ops.where(weight[..., 0] > 0, ops.sum(along * centres[:, :, None], axis=-1), 2.0)
        far = ops.top_k(-ops.reshape(apart, (self.heads, -1)), regions)[1]
        far = _taken(ops.reshape(along, (self.heads, -1, width)), far)
        far = ops.where(ops.sum(weight, axis=(1, 2, 3))[:, None, None] >= regions, far, centres)
        sums, counts = ops.sum(along * weight, axis=2), ops.sum(weight, axis=2)
        moved = moved_centres(xp, centres, sums, counts, self.partition.decay, far)
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


def _attention(q: Any, k: Any, v: Any, there: Any) -> Any:
    """Keras's own attention, regions as its batch; zero where a region has no keys.

    JAX's takes three times as long on a CPU as the two products do, so there they are written out.
    """
    mask = None
    if there is not None:
        some = ops.any(there, axis=-1, keepdims=True)
        mask = ops.logical_or(there, ops.logical_not(some))[:, :, None]
    if _products():
        scores = ops.cast(ops.matmul(q / sqrt(q.shape[-1]), ops.transpose(k, (0, 1, 3, 2))), "float32")
        scores = scores if mask is None else ops.where(mask, scores, FAR)
        y = ops.matmul(ops.cast(ops.softmax(scores), v.dtype), v)
    else:
        flat = (-1, q.shape[2], 1, q.shape[3])
        if mask is not None:
            mask = ops.repeat(ops.reshape(mask, (-1, 1, 1, q.shape[2])), q.shape[2], axis=2)
        y = ops.reshape(
            ops.dot_product_attention(*(ops.reshape(t, flat) for t in (q, k, v)), mask=mask), (-1, *q.shape[1:])
        )
    return y if there is None else ops.where(some[..., None], y, ops.zeros_like(y))


def _products() -> bool:
    """Whether attention is two products."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "cpu"


def _slots(scores: Any, capacity: int, there: Any) -> Any:
    """Balanced routing: at once where PyTorch lets numbers be read, in fixed shapes where graphs are compiled."""
    if keras.backend.backend() == "torch":
        import torch

        if scores.device.type == "cpu" and not torch.compiler.is_compiling():
            present = None if there is None else there.numpy()
            return ops.convert_to_tensor(balanced_slots_now(scores.numpy(), capacity, present))
    return balanced_slots(xp, scores, capacity, there, inverse=_inverse)


def _inverse(order: Any) -> Any:
    """The inverse of permutations along axis 1."""
    tokens = order.shape[1]
    places = ops.reshape(_rows(order, tokens), (-1, 1))
    values = ops.reshape(ops.zeros_like(order) + ops.arange(tokens, dtype=order.dtype), (-1,))
    found = ops.scatter_update(ops.zeros_like(values), places, values)
    return ops.reshape(found, (-1, tokens))


def _rows(order: Any, tokens: Any) -> Any:
    """order[g] + g * tokens: rows of groups that lie one below the other."""
    groups = ops.cumsum(ops.ones_like(order[:, :1]), axis=0) - 1
    return order + groups * tokens


def _taken(x: Any, order: Any) -> Any:
    """x[g, order[g]] of (groups, tokens, d)."""
    places = _rows(order, ops.cast(ops.shape(x)[1], order.dtype))
    rows = ops.take(ops.reshape(x, (-1, x.shape[2])), ops.reshape(places, (-1,)), axis=0)
    return ops.reshape(rows, (-1, order.shape[1], x.shape[2]))


def _permuted(x: Any, order: Any, back: Any) -> Any:
    """`_taken` of permutations and their inverse: backward takes as well, where it would have to add."""

    @ops.custom_gradient
    def run(x: Any) -> Any:
        def grad(*args: Any, upstream: Any = None) -> Any:
            return _taken(args[0] if upstream is None else upstream, back)

        return _taken(x, order), grad

    return run(x)
