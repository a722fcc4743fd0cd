"""Good citizens in Keras, all layers alike: configuration, files, shapes, mixed precision, masks, jit_compile and fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from ranger_nn import Blocks, Grid, KMeans, TimeSlices
from ranger_nn.aggregate import Softmax, WeightedMean
from ranger_nn.keras import BlockDense, ClusteredAttention, RegionalAggregator, SlicedRNN
from tests.pages import example

BACKEND = keras.backend.backend()


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)


def cnn() -> keras.Sequential:
    """(batch, h, w, 2) -> (batch, 3)."""
    return keras.Sequential([layers.Conv2D(3, 3, padding="same", activation="relu"), layers.GlobalAveragePooling2D()])


Case = tuple[Callable[..., Any], tuple[int, ...]]
IMAGE = (6, 10, 2)
CASES: dict[str, Case] = {
    "sum": (lambda **k: RegionalAggregator(Grid(2, 2), "sum", local=cnn(), **k), IMAGE),
    "learned": (lambda **k: RegionalAggregator(Grid(2, 2), "weighted_mean", local=cnn(), **k), IMAGE),
    "predicted": (lambda **k: RegionalAggregator(Grid(2, 2), WeightedMean("predicted"), local=cnn(), **k), IMAGE),
    "softmax": (lambda **k: RegionalAggregator(Grid(2, 2), Softmax(hidden=4, gated=True), local=cnn(), **k), IMAGE),
    "logsumexp": (lambda **k: RegionalAggregator(Grid(2, 2), "logsumexp", local=cnn(), **k), IMAGE),
    "moments": (lambda **k: RegionalAggregator(Grid(2, 2), "moments", local=cnn(), **k), IMAGE),
    "stitch": (
        lambda **k: RegionalAggregator(
            Grid(2, 2, overlap=1, window="linear"), "stitch", local=layers.Dense(3), coordinates=True, **k
        ),
        IMAGE,
    ),
    "per region": (
        lambda **k: RegionalAggregator(TimeSlices(3), "concat", local=layers.Dense(3), per_region=True, **k),
        (9, 4),
    ),
    "blocks": (lambda **k: BlockDense(5, Blocks(2, 3), "relu", **k), (3, 7)),
    "sliced": (lambda **k: SlicedRNN(layers.GRU(4, **k), (4, 2), **k), (11, 3)),
    "attention": (lambda **k: ClusteredAttention(2, KMeans(3, balanced=True), summaries=True, **k), (11, 8)),
}


def batch(name: str, samples: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((samples, *CASES[name][1])).astype("float32")


def model_of(layer: Any, shape: tuple[int, ...]) -> keras.Model:
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def as_numpy(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(x, "float32"))


@pytest.mark.parametrize("name", CASES)
def test_configuration_shape_and_file(name: str, tmp_path: Path) -> None:
    """Configuration through JSON, `compute_output_shape` with an unknown batch, and a `.keras` file."""
    make, shape = CASES[name]
    layer, x = make(), batch(name)
    model = model_of(layer, shape)
    y = as_numpy(model(x))
    assert layer.compute_output_shape((None, *shape)) == (None, *y.shape[1:])
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(config)
    other = model_of(again, shape)
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(as_numpy(other(x)), y)
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(as_numpy(keras.saving.load_model(tmp_path / "m.keras")(x)), y)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *((n, "mixed_bfloat16") for n in CASES if n != "attention"),
        pytest.param("attention", "mixed_bfloat16", marks=pytest.mark.slow),
        ("softmax", "mixed_float16"),
        ("attention", "mixed_float16"),
    ],
)
def test_mixed_precision(name: str, policy: str) -> None:
    """Results in half, weights in full, near the numbers in full."""
    make, x = CASES[name][0], batch(name)
    half, full = make(dtype=policy), make()
    y = half(x)
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    assert {v.dtype for v in half.trainable_variables} == {"float32"}
    full(x)
    full.set_weights(half.get_weights())
    near = np.isclose(as_numpy(y), as_numpy(full(x)), rtol=0.1, atol=0.1)
    # a token between two regions may go to the other one
    assert near.mean() > 0.9 if name == "attention" else near.all()


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles on torch through inductor, which is slow to start")
@pytest.mark.parametrize("name", ["softmax", "stitch", "per region", "blocks"])  # the others: in their own tests
def test_fit_compiled(name: str) -> None:
    """`fit` under jit_compile: the loss goes down; the compiled forward has the eager one's numbers."""
    make, shape = CASES[name]
    model, x = model_of(make(), shape), batch(name, 8)
    eager = as_numpy(model(x))
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=True)
    np.testing.assert_allclose(model.predict(x, verbose=0), eager, rtol=1e-3, atol=1e-4)
    losses = model.fit(x, np.full_like(eager, 0.5), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(BACKEND != "torch", reason="the other back ends fit compiled, above")
@pytest.mark.parametrize("name", CASES)
def test_fit(name: str) -> None:
    make, shape = CASES[name]
    model, x = model_of(make(), shape), batch(name, 8)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    y = np.full_like(as_numpy(model(x)), 0.5)
    losses = model.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_masks_reach_what_they_should() -> None:
    """Steps that `Masking` hides do not count: the result is that of whatever numbers stand there."""
    x, hidden = np.random.default_rng(0).standard_normal((2, 12, 8)).astype("float32"), slice(7, None)
    x[1, hidden] = 0
    kinds: dict[str, Any] = {
        "sliced": SlicedRNN(layers.GRU(4), (4, 3)),
        "attention": ClusteredAttention(2, KMeans(3, balanced=True)),
        "regional": RegionalAggregator(TimeSlices(3), "mean", local=layers.GRU(4)),
    }
    for name, layer in kinds.items():
        inputs = keras.Input((12, 8))
        model = keras.Model(inputs, layer(layers.Masking()(inputs)))
        mask = np.ones((2, 12), bool)
        mask[1, hidden] = False
        changed = x.copy()
        changed[1, hidden] = 3.0
        given, direct = as_numpy(model(x)), as_numpy(layer(changed, mask=ops.convert_to_tensor(mask)))
        picked = mask if name == "attention" else slice(None)
        np.testing.assert_allclose(given[picked], direct[picked], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_mask_goes_through_layers_that_keep_the_steps() -> None:
    """A recurrent layer behind them does not read the steps that are hidden."""
    x = np.ones((1, 6, 8), "float32")
    x[0, 4:] = 0
    for layer in (
        BlockDense(8, Blocks(2, 2)),
        ClusteredAttention(2, KMeans(3, balanced=True)),
        RegionalAggregator(TimeSlices(3), "stitch", local=layers.Dense(8)),
    ):
        inputs, gru = keras.Input((6, 8)), layers.GRU(3)
        steps = layer(layers.Masking()(inputs))
        read, given = (as_numpy(y) for y in keras.Model(inputs, [gru(steps), steps])(x))
        np.testing.assert_allclose(read, as_numpy(gru(given[:, :4])), rtol=1e-4, atol=1e-5)


def test_another_width_is_refused() -> None:
    """Never silently: a layer that was built for 7 features takes 7."""
    layer = BlockDense(4, Blocks(2, 2))
    layer(np.ones((2, 7), "float32"))
    with pytest.raises(ValueError, match="7"):
        layer(np.ones((2, 9), "float32"))


def test_the_article_s_network() -> None:
    """Its two-argument form adds the two hidden layers, and they are trained."""
    article = example("article_keras")
    net, x = article.SimpleNet(), np.random.default_rng(0).random((100, 2)).astype("float32")
    expected = net(x)
    assert len(net.trainable_variables) == 6
    np.testing.assert_allclose(as_numpy(expected), as_numpy(net.out(net.h1(x) + net.h2(x))), rtol=1e-6, atol=1e-7)
    before = [v.copy() for v in net.get_weights()]
    net.compile(optimizer="sgd", loss="mse")
    net.fit(x, np.random.default_rng(1).random((100, 1)), epochs=10, verbose=0)
    assert all(not np.array_equal(a, b) for a, b in zip(before, net.get_weights()))
