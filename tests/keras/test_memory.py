"""`RegionalAggregator(memory=)` in Keras: a step of training as without it, whatever the local network changes, or refused."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from ranger_nn import Grid, PartitionError, TimeSlices
from ranger_nn.keras import RegionalAggregator
from ranger_nn.keras.layers import looped

X = (np.random.default_rng(0).normal(size=(2, 8, 6, 2)) * np.linspace(0, 3, 8)[:, None, None]).astype("float32")


@pytest.fixture(params=[2, 4])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many of the four regions run together, whatever they take."""
    monkeypatch.setattr(looped, "at_once", lambda *given: min(request.param, given[3]))
    return int(request.param)


def cnn(*between: Any, **given: Any) -> keras.Sequential:
    return keras.Sequential([layers.Conv2D(4, 3, padding="same", **given), *between, layers.GlobalAveragePooling2D()])


def norm() -> keras.Sequential:
    return cnn(layers.BatchNormalization(momentum=0.5), layers.ReLU())


def fitted(local: Any, memory: str | None, x: np.ndarray = X, partition: Any = None, **given: Any) -> list[np.ndarray]:
    """All variables after two steps."""
    keras.utils.set_random_seed(0)
    layer = RegionalAggregator(partition or Grid(2, 2), "mean", local=local(), memory=memory, **given)
    model = keras.Sequential([keras.Input(x.shape[1:]), layers.Dense(2), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    keras.utils.set_random_seed(1)
    for _ in range(2):
        model.train_on_batch(x, np.ones(model.output_shape[1:], "float32")[None].repeat(len(x), 0))
    return [ops.convert_to_numpy(v) for v in model.variables if "seed" not in v.path]


def check(local: Any, **given: Any) -> None:
    for a, b in zip(fitted(local, None, **given), fitted(local, "1GB", **given)):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)


def test_norms_of_one_call_and_of_one_region(at_once: int) -> None:
    """Statistics once; in several calls they cannot be those of all regions, and that is said."""
    if at_once == 4:
        check(norm)
        return
    with pytest.raises(PartitionError, match=r"in 2 calls, and the local network changes .*moving_mean"):
        fitted(norm, "1GB")


@pytest.mark.slow
def test_norms_of_each_region(at_once: int) -> None:
    """A network for each region has statistics of its own: nothing is divided."""
    check(norm, per_region=True)


def test_random_layers_draw_the_same_again() -> None:
    """Masks of backward are those of forward; in one call those without memory."""
    check(lambda: cnn(layers.Dropout(0.5, seed=3)))


def test_training_reaches_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs again in backward is told that it trains; a frozen norm may be divided."""

    monkeypatch.setattr(looped, "at_once", lambda *_: 2)

    def frozen() -> keras.Sequential:
        net = norm()
        net.layers[1].trainable = False
        return net

    check(frozen)


def test_masks_reach_the_local_network() -> None:
    layer = [
        RegionalAggregator(TimeSlices(4), "sum", local=layers.GlobalAveragePooling1D(), memory=m) for m in (None, "1GB")
    ]
    x = np.random.default_rng(0).normal(size=(2, 8, 3)).astype("float32")
    mask = ops.convert_to_tensor(np.arange(8)[None] < np.array([[7], [3]]))
    plain, small = (ops.convert_to_numpy(one(x, mask=mask)) for one in layer)
    np.testing.assert_allclose(small, plain, rtol=1e-5, atol=1e-6)


def test_regularisers_of_stacked_weights() -> None:
    """Each region's weights have the layer's regulariser and constraint."""
    local = cnn(kernel_regularizer=keras.regularizers.L2(0.5), kernel_constraint=keras.constraints.MaxNorm(0.1))
    layer = RegionalAggregator(Grid(2, 2), "mean", local=local, per_region=True)
    layer(X)
    kernel = ops.convert_to_numpy(layer.stacked.stacked_weights[0])
    np.testing.assert_allclose(ops.convert_to_numpy(layer.losses[0]), 0.5 * (kernel**2).sum(), rtol=1e-5)
    bound = ops.convert_to_numpy(layer.stacked.stacked_weights[0].constraint(layer.stacked.stacked_weights[0]))
    np.testing.assert_allclose((bound[1] ** 2).sum(0).max(), 0.01, rtol=1e-3)


def test_refused_by_name() -> None:
    """Losses that the local network adds; weights that it writes."""
    for given in ({"memory": "1GB"}, {"per_region": True}):
        with pytest.raises(PartitionError, match="adds losses"):
            RegionalAggregator(Grid(2, 2), "mean", local=cnn(activity_regularizer="l2"), **given)(X)
    spectral = keras.Sequential([layers.SpectralNormalization(layers.Conv2D(2, 3)), layers.GlobalAveragePooling2D()])
    if keras.backend.backend() != "jax":
        with pytest.raises(PartitionError, match="a weight, while it runs"):
            RegionalAggregator(Grid(2, 2), "mean", local=spectral, memory="1GB")(X, training=True)
