"""One layer with a set of weights for each region, held as stacked variables (regions, ...)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.keras.layers.pure import applied
from ranger_nn.keras.private import layers_of


class Untracked:
    """Holds something that a layer uses but does not own: Keras tracks no variables in it."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Stacked(keras.layers.Layer):
    """`regions` independent copies of `layer`, applied to stacked regions through `keras.ops.vectorized_map`.

    Weights are stacked, (regions, ...), each copy initialised as a new layer of the same configuration would be. The
    layer must have no state besides its weights (no BatchNormalization, no Dropout): `RegionalAggregator` uses a list
    of copies for those.
    """

    def __init__(self, layer: Any, regions: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.template = Untracked(layer)
        self.regions = regions
        self.stacked_weights: list[Any] = []

    def build(self, shape: Any) -> None:
        """Make the weights for regions of `shape` (batch first)."""
        layer = self.template.held
        if not layer.built:
            layer.build(shape)
        copies: list[list[np.ndarray]] = []

        def values(k: int) -> np.ndarray:
            while len(copies) < self.regions:
                copy = type(layer).from_config(layer.get_config())
                copy.build(shape)
                copies.append([ops.convert_to_numpy(v) for v in copy.trainable_variables])
            return np.stack([c[k] for c in copies])

        for k, variable in enumerate(layer.trainable_variables):
            self.stacked_weights.append(
                self.add_weight(
                    shape=(self.regions, *variable.shape),
                    dtype=variable.dtype,
                    initializer=lambda shape, dtype=None, k=k: ops.convert_to_tensor(values(k), dtype=dtype),
                    name=variable.path.replace("/", "_"),
                    regularizer=_each(variable.regularizer, sum),
                    constraint=_each(variable.constraint, lambda found: ops.stack(found, axis=0)),
                )
            )
        self.built = True

    def call(self, stacked: Any, ids: Any = None) -> Any:
        """Region ids[k]'s copy on stacked[k]: (regions, batch, ...) in and out. None: all regions, in order."""
        weights = [self.picked(w, ids) for w in self.stacked_weights]
        return self.apply(weights, stacked)

    def picked(self, weight: Any, ids: Any) -> Any:
        """The weights of these regions."""
        if ids is None or (isinstance(ids, list) and ids == list(range(self.regions))):
            return ops.convert_to_tensor(weight)
        return ops.take(weight, np.asarray(ids, "int32") if isinstance(ids, list) else ids, axis=0)

    def apply(self, weights: list[Any], stacked: Any, training: bool | None = None) -> Any:
        """The layer with these weights, region by region, in one call (or unrolled, see `_unrolled`)."""
        layer = self.template.held

        def one(given: Any) -> Any:
            *own, x = given
            return applied(layer, layer.trainable_variables, list(own), lambda: layer(x, training=training))[0]

        if not _unrolled(layer):
            return ops.vectorized_map(one, (*weights, stacked))
        return ops.stack([one((*(w[i] for w in weights), stacked[i])) for i in range(stacked.shape[0])], axis=0)


def _each(function: Any, joined: Any) -> Any:
    """A regulariser or constraint of a weight, on each region's own."""
    return None if function is None else lambda w: joined([function(w[i]) for i in range(w.shape[0])])


def has_state(layer: Any) -> bool:
    """Does the layer hold more than weights: statistics, random seeds."""
    if not isinstance(layer, keras.layers.Layer):
        return False
    return bool(layer.non_trainable_variables) or any(
        isinstance(sub, keras.layers.BatchNormalization | keras.layers.Dropout | keras.layers.RNN)
        for sub in layers_of(layer)
    )


def _unrolled(layer: Any) -> bool:
    """Convolutions and pooling are unrolled, but on JAX.

    TensorFlow's vectorised map turns a convolution into a loop that XLA cannot differentiate, and PyTorch's vmap refuses
    how Keras calls one.
    """
    if keras.backend.backend() == "jax":
        return False
    windows = tuple(getattr(keras.layers, n) for n in dir(keras.layers) if "Conv" in n or "Pool" in n)
    return any(isinstance(sub, windows) for sub in layers_of(layer))
