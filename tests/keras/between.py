"""A function between two convolutions, region by region and untouched: numbers, a step of training, what stays whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

import ranger_nn
from tests.keras.nets import shaken
from tests.keras.regions import apart


def between(function: Callable[[Any], Any], shape: Sequence[int]) -> keras.Model:
    """Convolution, function, and where it gives a map of the input's rank, a convolution."""
    conv = {3: L.Conv1D, 4: L.Conv2D, 5: L.Conv3D}[len(shape)]
    inputs = keras.Input(shape[1:], batch_size=shape[0])
    y = function(conv(4, 3, padding="same")(inputs))
    return keras.Model(inputs, conv(3, 3, padding="same")(y) if len(y.shape) == len(shape) else y)


def trained(function: Callable[[Any], Any], shape: Sequence[int], regions: Sequence[int] | None) -> Any:
    """(result, weights after a step along the gradient, plan of that step)."""
    keras.utils.set_random_seed(3)
    model = shaken(between(function, shape))
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    ours: Any = model if regions is None else ranger_nn.regionalize(model, regions=regions)
    y = ops.convert_to_numpy(ours(x))
    ours.compile(keras.optimizers.SGD(0.1), "mse")
    ours.train_on_batch(x, np.zeros_like(y))
    plans = (
        ()
        if regions is None
        else tuple(ranger_nn.plan(model, shape, regions=regions, training=t) for t in (False, True))
    )
    return y, model.get_weights(), plans


def check(function: Callable[[Any], Any], shape: Sequence[int], *regions: int, whole: int = 0) -> Any:
    """Plans for inference and training, of which `whole` operators may stay whole, where regions give what the model gives."""
    ours, theirs = trained(function, shape, regions), trained(function, shape, None)
    assert apart(ours[0], theirs[0]) < 1e-5
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert apart(a, b) < 2e-5
    for plan in ours[2]:
        assert len(plan.whole) <= whole, plan.whole
        assert max(row.regions for row in plan.sweeps) > 1
    return ours[2]
