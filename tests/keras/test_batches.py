"""Batches of any size: the last one of an epoch is smaller, and numbers stay those of the untouched model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import ranger_nn
from tests.keras.nets import images, net
from tests.keras.regions import apart

BACKEND = keras.backend.backend()
ON_TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow traces open shapes")


def twins(width: int = 4) -> tuple[keras.Model, keras.Model]:
    """The same network twice, with the same weights."""
    keras.utils.set_random_seed(0)
    model = net(width)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return model, twin


def labels(count: int) -> Any:
    """Seeded targets of `net`."""
    return np.random.default_rng(1).standard_normal((count, 24, 16, 2)).astype("float32")


class Batches(keras.utils.PyDataset):
    """What a loader of files gives: batches of four, the last one of two."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __len__(self) -> int:
        return -(-len(self.x) // 4)

    def __getitem__(self, i: int) -> Any:
        return self.x[4 * i : 4 * i + 4], self.y[4 * i : 4 * i + 4]


def test_predict_with_a_last_batch_that_is_smaller() -> None:
    """Five images in batches of two, then all at once; then taller ones."""
    model = net()
    small = ranger_nn.regionalize(model, regions=(8,))
    x = images(5)
    assert apart(small.predict(x, batch_size=2, verbose=0), model.predict(x, verbose=0)) < 1e-5
    assert apart(small.predict(x, batch_size=5, verbose=0), model.predict(x, verbose=0)) < 1e-5
    taller = images(2, rows=40)
    assert apart(small.predict(taller, verbose=0), model.predict(taller, verbose=0)) < 1e-5


@pytest.mark.parametrize("source", [pytest.param("arrays", marks=pytest.mark.slow), "dataset"])
def test_fit_with_a_last_batch_that_is_smaller(source: str) -> None:
    """Losses, weights, running statistics and a validation set of ten images in batches of four, two epochs."""
    model, twin = twins()
    x, y = images(10), labels(10)
    options = {"epochs": 2, "verbose": 0, "shuffle": False}
    losses = []
    for each in (model, ranger_nn.regionalize(twin, regions=(12,))):
        each.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        if source == "arrays":
            found = each.fit(x, y, batch_size=4, validation_data=(x[:3], y[:3]), **options)
        else:
            found = each.fit(Batches(x, y), validation_data=Batches(x[:5], y[:5]), **options)
        losses.append(found.history["loss"] + found.history["val_loss"])
    assert np.abs(np.subtract(*losses)).max() < 1e-5
    for a, b in zip(twin.get_weights(), model.get_weights(), strict=True):
        assert np.abs(a - b).max() < 1e-5


@ON_TENSORFLOW
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        pytest.param({"steps_per_execution": 2}, marks=pytest.mark.slow),
    ],
)
def test_fit_on_a_tensorflow_dataset(options: dict[str, Any]) -> None:
    """Of batches of unknown size, with sample weights; evaluated and predicted from such a dataset too."""
    import tensorflow as tf

    model, twin = twins()
    x, y, w = images(5), labels(5), np.broadcast_to(np.linspace(0.5, 1.5, 5)[:, None, None], (5, 24, 16))
    data = tf.data.Dataset.from_tensor_slices((x, y, w)).batch(2)
    small = ranger_nn.regionalize(twin, regions=(12,))
    for each, own in ((model, {}), (small, options)):
        each.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"], **own)
        each.fit(data, verbose=0)
    for a, b in zip(twin.get_weights(), model.get_weights(), strict=True):
        assert np.abs(a - b).max() < 1e-5
    assert np.allclose(small.evaluate(data, verbose=0), model.evaluate(data, verbose=0), atol=1e-5)
    only = data.map(lambda x, y, w: x)
    assert apart(small.predict(only, verbose=0), model.predict(only, verbose=0)) < 1e-5


@ON_TENSORFLOW
def test_a_trace_for_each_shape() -> None:
    """Two sizes of batches, two traces, whatever the number of epochs; compiling again begins anew."""
    _, twin = twins()
    small = ranger_nn.regionalize(twin, regions=(12,))
    calls = []
    call = small._call
    small._call = lambda *args: calls.append(args[0].shape) or call(*args)
    small.compile("sgd", "mse")
    small.fit(images(5), labels(5), batch_size=2, epochs=3, verbose=0)
    assert sorted(s[0] for s in calls) == [1, 2]
    small.fit(images(5), labels(5), batch_size=2, verbose=0)
    assert len(calls) == 2
    small.compile("sgd", "mse")
    small.fit(images(2), labels(2), verbose=0)
    assert len(calls) == 3


@ON_TENSORFLOW
def test_open_shapes() -> None:
    """A batch may be open: samples run one after the other. Rows may not."""
    import tensorflow as tf

    model = net()
    small = ranger_nn.regionalize(model, regions=(8,))
    run = tf.function(small, input_signature=[tf.TensorSpec((None, 24, 16, 3), "float32")], autograph=False)
    assert apart(run(images(3)), model(images(3))) < 1e-5
    with pytest.raises(ValueError, match="only the batch may be open"):
        tf.function(lambda x: small(x), autograph=False).get_concrete_function(
            tf.TensorSpec((1, None, 16, 3), "float32")
        )


def around(model: keras.Model) -> keras.Model:
    """A model around a regional one."""
    inputs = keras.Input((24, 16, 3))
    return keras.Model(inputs, ranger_nn.regionalize(model, regions=(12,))(L.Rescaling(2.0)(inputs)))


@ON_TENSORFLOW
def test_batch_statistics_need_a_known_batch() -> None:
    """A model around knows no size in `fit`, and one sample has other statistics: refused, with the layer and ways out."""
    x, y = images(5), labels(5)
    model, twin = twins()
    outer = around(twin)
    outer.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"BatchNormalization.*statistics over the batch.*regionalize the outer model"):
        outer.fit(x, y, batch_size=2, verbose=0)
    for layer in twin.layers:
        if isinstance(layer, L.BatchNormalization):
            layer.trainable = False
    outer.compile("sgd", "mse")
    outer.fit(x, y, batch_size=2, verbose=0)
    assert np.abs(twin.get_weights()[0] - model.get_weights()[0]).max() > 0


def test_the_model_around_is_regionalized_instead() -> None:
    """The way out of the test above, and on all back ends: statistics over the whole of every batch."""
    model, twin = twins()
    x, y = images(5), labels(5)
    plain = keras.Sequential([keras.Input((24, 16, 3)), L.Rescaling(2.0), model])
    small = ranger_nn.regionalize(keras.Sequential([keras.Input((24, 16, 3)), L.Rescaling(2.0), twin]), regions=(12,))
    for each in (plain, small):
        each.compile(keras.optimizers.SGD(0.05), "mse")
        each.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(twin.get_weights(), model.get_weights(), strict=True):
        assert np.abs(a - b).max() < 1e-5


# ---------------------------------------------------------------------------------------------- masks


def steps(count: int = 3) -> Any:
    """Words, of which 0 is masked."""
    return np.random.default_rng(0).integers(0, 5, (count, 9)).astype("int32")


def embedded() -> keras.Model:
    """Steps that are masked where the word is 0."""
    start = keras.layers.Input((9,), dtype="int32")
    return keras.Model(start, L.Dense(2)(L.Embedding(5, 4, mask_zero=True)(start)))


@ON_TENSORFLOW
def test_masks_of_an_open_batch() -> None:
    """Results of samples that run one after the other have their mask."""
    import tensorflow as tf

    model = embedded()
    small = ranger_nn.regionalize(model, regions=(4,))
    masks = []

    @tf.function(input_signature=[tf.TensorSpec((None, 9), "int32")], autograph=False)
    def run(x: Any) -> Any:
        y = small(x)
        masks.append(y._keras_mask)
        return y, y._keras_mask

    y, mask = run(steps())
    assert apart(y, model(steps())) < 1e-6
    assert np.array_equal(mask, steps() != 0)


def test_masks_reach_the_loss_of_every_batch() -> None:
    """Of the last, smaller one as well."""
    model = embedded()
    wanted = np.random.default_rng(1).standard_normal((5, 9, 2)).astype("float32")
    found = []
    for run in (model, ranger_nn.regionalize(model, regions=(4,))):
        run.compile("sgd", "mse")
        found.append(run.evaluate(steps(5), wanted, batch_size=2, verbose=0))
    assert abs(found[0] - found[1]) < 1e-6
    unmasked = np.mean((ops.convert_to_numpy(model(steps(5))) - wanted) ** 2)
    assert abs(found[0] - unmasked) > 1e-3


class Block(keras.Model):
    """A model that does not take the mask which a layer inside takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.then = L.LSTM(3, return_sequences=True), L.Dense(2)

    def call(self, x: Any) -> Any:
        return self.then(self.first(x))


@pytest.mark.parametrize("subclassed", [False, True])
def test_a_mask_comes_in(subclassed: bool) -> None:
    """From a layer before the regional model, or by hand."""
    if subclassed:
        inner: keras.Model = Block()
        inner(np.zeros((1, 9, 4), "float32"))
    else:
        inner = keras.Sequential([keras.Input((9, 4)), L.LSTM(3, return_sequences=True), L.Dense(2)])
    start = keras.layers.Input((9,), dtype="int32")
    x = L.Embedding(5, 4, mask_zero=True)(start)
    plain = keras.Model(start, inner(x))
    regional = keras.Model(start, ranger_nn.regionalize(inner, regions=(4,))(x))
    assert apart(regional.predict(steps(), verbose=0), plain.predict(steps(), verbose=0)) < 1e-6
    given = ops.ones((2, 9, 4))
    mask = ops.convert_to_tensor(np.arange(9)[None] < np.array([[3], [9]]))
    unmasked = ops.convert_to_numpy(inner(given))
    found = ranger_nn.regionalize(inner, regions=(4,))(given, mask=mask)
    if not subclassed:  # the other one takes no mask by hand
        assert apart(found, inner(given, mask=mask)) < 1e-6
        assert apart(found, unmasked) > 1e-3


def test_a_mask_goes_through_a_block_that_does_not_take_it() -> None:
    """To the layer inside that does."""
    start = keras.layers.Input((9,), dtype="int32")
    model = keras.Model(start, Block()(L.Embedding(5, 4, mask_zero=True)(start)))
    small = ranger_nn.regionalize(model, regions=(4,))
    assert apart(small.predict(steps(), verbose=0), model.predict(steps(), verbose=0)) < 1e-6
