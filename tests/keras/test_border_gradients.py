"""Rows outside of a value have a gradient of zero, also where an operator's derivative there is infinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

import ranger_nn

X = (np.random.default_rng(0).random((2, 17, 3)) + 0.5).astype("float32")


class Quotient(keras.Layer):
    """A weight in the operator whose derivative is infinite."""

    def build(self, shape: Any) -> None:
        """One number for each channel."""
        self.weight = self.add_weight(shape=(shape[-1],), initializer="ones", name="weight")

    def call(self, x: Any) -> Any:
        """Of a weight and what the layer is given."""
        return self.weight / x


NETS: dict[str, Callable[[Any], Any]] = {
    "logarithm": ops.log,
    "reciprocal": lambda h: 1.0 / h,
    "power of a power": lambda h: ops.power(ops.power(h, 0.5), -1.5),
    "unit norm": L.UnitNormalization(),
    "weight": lambda h: Quotient()(h),
    "rows that nothing needs": lambda h: L.Conv1D(4, 3, padding="same")(ops.log(h)[:, 6:]),
}


def joined() -> Any:
    """Each function behind a convolution of its own, and a convolution behind it."""
    inputs, found = keras.Input(X.shape[1:]), []
    for function in NETS.values():
        positive = keras.initializers.RandomUniform(0.1, 0.3)
        h = L.Conv1D(4, 3, padding="same", kernel_initializer=positive)(inputs)
        found.append(L.Conv1D(2, 3, padding="same")(function(h)))
    return keras.Model(inputs, found)


def trained(regions: int | None) -> list[tuple[str, np.ndarray]]:
    """Weights after a step along the gradient."""
    keras.utils.set_random_seed(1)
    model = joined()
    ours = model if regions is None else ranger_nn.regionalize(model, regions=(regions,))
    ours.compile(keras.optimizers.SGD(1.0), "mse")
    ours.train_on_batch(X, [np.zeros((2, *s[1:]), "float32") for s in model.output_shape])
    return [(v.path, ops.convert_to_numpy(v)) for v in model.trainable_variables]


def test_gradients_of_weights_are_those_of_the_untouched_model() -> None:
    """17 rows in regions of 5: 3 of the last lie beyond the end, those around a convolution below 0."""
    for (path, ours), (_, theirs) in zip(trained(5), trained(None), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=path)
