"""Layers that draw noise while training: each step of a slide draws its own rows, from the layer's seed and its position.

The rows of a step, computed again in backward, get the same noise. It is not the noise that the untouched layer would
draw from the same seed, but has the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import keras
from keras import ops

from ranger_nn.keras.kernels import Kernel, Local

SPREAD = 7919
"""Between the counters of neighbouring positions, so that few steps of training share a seed."""


class Fixed(keras.random.SeedGenerator):
    """A generator whose next seed is given: it has no state."""

    def __init__(self, seed: Any) -> None:
        """`seed`: two integers."""
        self.seed, self._initial_seed = seed, 0  # where Keras draws, it reads the second (a private name)

    def next(self, ordered: bool = True) -> Any:
        """The seed."""
        return self.seed


def _dropout(layer: Any, x: Any, seed: Any) -> Any:
    shape = layer.noise_shape and [None if n is None or n > 1 else n for n in layer.noise_shape]
    return keras.random.dropout(x, layer.rate, noise_shape=shape, seed=seed)


def shared_over_space(layer: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a spatial dropout's mask: one number for each sample and channel."""
    first = getattr(layer, "data_format", "channels_last") == "channels_first"  # the 1-D layer has none
    return tuple(n if d in (0, 1 if first else len(shape) - 1) else 1 for d, n in enumerate(shape))


def _spatial(layer: Any, x: Any, seed: Any) -> Any:
    return keras.random.dropout(x, layer.rate, noise_shape=shared_over_space(layer, x.shape), seed=seed)


def _gaussian_noise(layer: Any, x: Any, seed: Any) -> Any:
    return x + keras.random.normal(x.shape, 0.0, layer.stddev, dtype=layer.compute_dtype, seed=seed)


def _gaussian_dropout(layer: Any, x: Any, seed: Any) -> Any:
    spread = sqrt(layer.rate / (1.0 - layer.rate))
    return x * keras.random.normal(x.shape, 1.0, spread, dtype=layer.compute_dtype, seed=seed)


NOISE: dict[type, Callable[[Any, Any, Any], Any]] = {
    keras.layers.Dropout: _dropout,
    keras.layers.SpatialDropout1D: _spatial,
    keras.layers.SpatialDropout2D: _spatial,
    keras.layers.SpatialDropout3D: _spatial,
    keras.layers.GaussianNoise: _gaussian_noise,
    keras.layers.GaussianDropout: _gaussian_dropout,
}


class Noise(Kernel):
    """One of these layers; inputs x and a seed that is drawn once for each forward pass."""

    tame, positional = True, True

    def __init__(self, layer: Any, same: Sequence[int]) -> None:
        """`same`: dimensions along which all places share their noise."""
        function = NOISE[type(layer)]
        super().__init__(lambda x, seed: function(layer, x, Fixed(seed)))
        self.same = set(same)

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Noise of these rows."""
        if dim in self.same:
            return lambda x, seed, position=None: self.function(x, seed)

        def local(x: Any, seed: Any, position: Any) -> Any:
            shift = ops.stack([ops.zeros((), seed.dtype), ops.cast(position * SPREAD, seed.dtype)])
            return self.function(x, seed + shift)

        return local

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """The mask."""
        return 2 * out_bytes
