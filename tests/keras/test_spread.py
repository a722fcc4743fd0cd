"""Variance and standard deviation are the operator's own: not from one pass, which loses them where the mean is large."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import ranger_nn

FAR = (1000.0 + np.random.default_rng(0).random((1, 17, 7, 8))).astype("float32")


@pytest.mark.parametrize("axis", [-1, 1, (1, 2)])
@pytest.mark.parametrize("function", [ops.var, ops.std])
def test_far_from_zero(function: Any, axis: Any) -> None:
    """Along channels and along rows, cut or whole."""
    inputs = keras.Input(FAR.shape[1:])
    model = keras.Model(inputs, function(inputs, axis=axis))
    true = getattr(np, function.__name__)(FAR.astype("float64"), axis=axis)
    for regions in ((5,), (17,)):
        found = ops.convert_to_numpy(ranger_nn.regionalize(model, regions=regions)(FAR))
        np.testing.assert_allclose(found, true, rtol=1e-3)


@pytest.mark.parametrize("axis", [-1, (1, 2)])
def test_gradient_of_no_deviation(axis: Any) -> None:
    """As the back end has it: zero on PyTorch."""
    weights = []
    for regions in (None, (5,)):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((15, 3, 4))
        model = keras.Model(inputs, ops.std(L.Dense(2, use_bias=False)(inputs), axis=axis))
        ours = model if regions is None else ranger_nn.regionalize(model, regions=regions)
        ours.compile(keras.optimizers.SGD(1.0), "mse")
        ours.train_on_batch(np.zeros((1, 15, 3, 4), "float32"), np.ones((1, *model.output_shape[1:]), "float32"))
        weights.append(model.get_weights()[0])
    np.testing.assert_allclose(weights[1], weights[0])
