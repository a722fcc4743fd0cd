"""`RegionalAggregator` and `BlockDense` in Keras: by hand, beside PyTorch's, saved and loaded, fitted, compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

from ranger_nn import Blocks, BudgetError, Grid, KMeans, PartitionError, TimeSlices
from ranger_nn.aggregate import Softmax, WeightedMean
from ranger_nn.keras import BlockDense, RegionalAggregator
from ranger_nn.torch import RegionalAggregator as TorchAggregator
from tests.pages import example

BACKEND = keras.backend.backend()
REDUCTIONS = ["sum", "mean", "weighted_mean", "max", "min", "logsumexp", "softmax", "moments", "concat"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape or (3, 7, 10, 2)).astype("float32")


def cnn(features: int = 3) -> keras.Sequential:
    return keras.Sequential(
        [layers.Conv2D(features, 3, padding="same", activation="relu"), layers.GlobalAveragePooling2D()]
    )


def model_of(layer: Any, shape: tuple[int | None, ...] = (7, 10, 2)) -> keras.Model:
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def regions(x: np.ndarray) -> list[np.ndarray]:
    """`Grid(2, 2)` of 7 x 10: 4 + 3 by 5 + 5."""
    return [x[:, a:b, c:d] for a, b in ((0, 4), (4, 7)) for c, d in ((0, 5), (5, 10))]


def as_numpy(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_equals_pytorch(name: str) -> None:
    """The same numbers from both skins, on the regions' own features."""
    x = image()
    layer = RegionalAggregator(Grid(2, 2), name, local=lambda r: ops.mean(r, axis=(1, 2)))
    other = TorchAggregator(Grid(2, 2, axes=(1, 2)), name, local=lambda r: r.mean((1, 2)))
    y = layer(x)
    theirs = other(torch.tensor(x))
    if name == "softmax":
        with torch.no_grad():
            next(iter(other.score.parameters())).copy_(torch.tensor(as_numpy(layer.score.kernel)).T)
        theirs = other(torch.tensor(x))
    np.testing.assert_allclose(as_numpy(y), theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert tuple(layer.compute_output_shape((None, 7, 10, 2))) == (None, *y.shape[1:])


@pytest.mark.parametrize("memory", [None, "40kB"])
@pytest.mark.parametrize(
    "grid", [Grid(2, 2), Grid(2, 3, overlap=1), Grid(3, 2, overlap=2, window="cosine"), Grid(size=(3, 4))]
)
def test_stitch_of_a_pointwise_network_is_the_network(grid: Grid, memory: str | None) -> None:
    local, x = layers.Dense(4), image()
    y = RegionalAggregator(grid, "stitch", local=local, memory=memory)(x)
    np.testing.assert_allclose(as_numpy(y), as_numpy(local(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"memory": "80kB"}, {"per_region": True, "memory": "80kB"}, {"coordinates": True, "per_region": True}],
    ids=str,
)
def test_fit_save_load(options: dict[str, Any], tmp_path: Path) -> None:
    """Functional model, `fit`, `.keras` file: the same predictions."""
    x = image(8, 8, 10, 2)
    model = model_of(
        RegionalAggregator(Grid(2, 2, overlap=1, window="linear"), "stitch", local=layers.Dense(2), **options),
        (8, 10, 2),
    )
    model.compile("adam", "mse")
    before = model.evaluate(x, x, verbose=0)
    model.fit(x, x, epochs=30, verbose=0)
    assert model.evaluate(x, x, verbose=0) < before
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def gradients(layer: Any, x: np.ndarray) -> list[np.ndarray]:
    """Of the sum of squares, with respect to the layer's variables."""
    layer(x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = ops.sum(ops.square(layer(ops.convert_to_tensor(x))))
        return [as_numpy(g) for g in tape.gradient(loss, [v.value for v in layer.trainable_variables])]
    if BACKEND == "jax":
        import jax

        def loss_of(own: list[Any]) -> Any:
            return ops.sum(
                ops.square(layer.stateless_call(own, [v.value for v in layer.non_trainable_variables], x)[0])
            )

        return [as_numpy(g) for g in jax.grad(loss_of)([v.value for v in layer.trainable_variables])]
    loss = ops.sum(ops.square(layer(ops.convert_to_tensor(x))))
    return [as_numpy(g) for g in torch.autograd.grad(loss, [v.value for v in layer.trainable_variables])]


@pytest.mark.parametrize("per_region", [False, True])
def test_memory_does_not_change_gradients(per_region: bool) -> None:
    x = image(2, 8, 8, 2)
    made = [
        RegionalAggregator(Grid(2, 4), "softmax", local=cnn(), per_region=per_region, memory=memory)
        for memory in (None, "10kB")
    ]
    for layer in made:
        layer(x)
    made[1].set_weights(made[0].get_weights())
    for a, b in zip(*(gradients(layer, x) for layer in made)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_each_region_has_its_own_weights() -> None:
    layer, x = RegionalAggregator(Grid(2, 2), "concat", local=cnn(), per_region=True), image()
    y = as_numpy(layer(x))
    kernels, biases = layer.get_weights()
    assert kernels.shape == (4, 3, 3, 2, 3)
    assert not np.allclose(kernels[0], kernels[1])
    for i, region in enumerate(regions(x)):
        one = cnn()
        one.build(region.shape)
        one.set_weights([kernels[i], biases[i]])
        np.testing.assert_allclose(y[:, 3 * i : 3 * i + 3], as_numpy(one(region)), rtol=1e-4, atol=1e-5)


def test_networks_with_state_are_copied() -> None:
    local = keras.Sequential([layers.Dense(3), layers.BatchNormalization()])
    layer = RegionalAggregator(TimeSlices(3), "stitch", local=local, per_region=True)
    model = model_of(layer, (9, 2))
    model.compile("sgd", "mse")
    model.fit(image(4, 9, 2), image(4, 9, 3), verbose=0)
    means = [f.layers[1].moving_mean for f in layer.locals]
    assert not np.allclose(as_numpy(means[0]), as_numpy(means[1]))


def test_a_list_and_the_article_s_form() -> None:
    x = image(5, 4)
    layer = RegionalAggregator(lambda x: [x[:, :2], x[:, 2:]], ops.square)
    np.testing.assert_allclose(as_numpy(layer(x)), x[:, :2] ** 2 + x[:, 2:] ** 2, rtol=1e-6)
    two = [layers.Dense(3), layers.Dense(3)]
    y = RegionalAggregator(Blocks(2), "sum", local=two)(x)
    np.testing.assert_allclose(as_numpy(y), as_numpy(two[0](x[:, :2]) + two[1](x[:, 2:])), rtol=1e-5, atol=1e-6)


def test_masks_of_time() -> None:
    """Steps that are masked do not reach a recurrent local network; slices masked throughout are absent."""
    x = image(2, 8, 3)
    x[0, 5:] = 0
    x[1, 3:] = 0
    gru = layers.GRU(4)
    inputs = keras.Input((8, 3))
    model = keras.Model(inputs, RegionalAggregator(TimeSlices(4), "mean", local=gru)(layers.Masking()(inputs)))
    y = model.predict(x, verbose=0)
    first = [as_numpy(gru(x[:1, a : min(a + 2, 5)])) for a in (0, 2, 4)]
    np.testing.assert_allclose(y[:1], np.mean(first, 0), rtol=1e-4, atol=1e-5)
    second = [as_numpy(gru(x[1:, a : min(a + 2, 3)])) for a in (0, 2)]
    np.testing.assert_allclose(y[1:], np.mean(second, 0), rtol=1e-4, atol=1e-5)


def test_absent_regions() -> None:
    layer, x = RegionalAggregator(Grid(2, 2), "max", local=cnn()), image()
    present = np.array([[True] * 4, [True, False, True, False], [False] * 4])
    y, whole = as_numpy(layer(x, present=present)), as_numpy(layer(x))
    np.testing.assert_allclose(y[0], whole[0])
    assert (y[2] == 0).all()
    own = [as_numpy(layer.local(r))[1] for r in regions(x)]
    np.testing.assert_allclose(y[1], np.maximum(own[0], own[2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16"] if BACKEND == "jax" else ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy: str) -> None:
    layer = RegionalAggregator(Grid(2, 2), Softmax(hidden=4, gated=True), local=cnn(), dtype=policy)
    y = layer(image())
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    assert all(v.dtype == "float32" for v in layer.trainable_variables)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles on torch through inductor, which needs a C++ compiler")
@pytest.mark.parametrize("options", [{}, {"per_region": True}], ids=str)
def test_jit(options: dict[str, Any]) -> None:
    x = image()
    model = model_of(RegionalAggregator(Grid(2, 2), "weighted_mean", local=cnn(2), **options))
    model.compile("sgd", "mse", jit_compile=True)
    eager = as_numpy(model(x))
    np.testing.assert_allclose(model.predict(x, verbose=0), eager, rtol=1e-4, atol=1e-5)
    model.fit(x, np.zeros((3, 2)), verbose=0)


def test_functional_and_weights_from_config() -> None:
    layer = RegionalAggregator(
        TimeSlices(length=4, overlap=1), WeightedMean("size"), local=layers.GlobalAveragePooling1D()
    )
    again = RegionalAggregator.from_config(layer.get_config())
    assert again.partition == layer.partition
    assert again.aggregator == layer.aggregator
    x = image(2, 6, 3)
    np.testing.assert_allclose(as_numpy(layer(x)), as_numpy(again(x)))


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda x: RegionalAggregator(Grid(8, 2))(x), "8 regions .* 7 elements"),
        (lambda x: RegionalAggregator(Grid(2, 2), "mean", local=layers.Conv2D(2, 3))(x), "for region 0 and"),
        (lambda x: RegionalAggregator(Grid(2, 2), "stitch", local=layers.Conv2D(2, 3))(x), "keep the region's extent"),
        (lambda x: RegionalAggregator(Grid(2, 2), "stich"), "did you mean 'stitch'"),
        (lambda x: RegionalAggregator(Grid(2, 2), "sum", local=[layers.Dense(1)] * 3), "4 regions, local has 3"),
        (lambda x: RegionalAggregator(Grid(size=3), per_region=True, local=layers.Dense(2)), "known number of regions"),
        (lambda x: RegionalAggregator(Grid(size=3), "weighted_mean"), 'WeightedMean\\("size"\\)'),
        (lambda x: RegionalAggregator(Grid(2, 2), WeightedMean((1, 2))), "2 weights were given for 4 regions"),
        (lambda x: RegionalAggregator(7), "a partition is a Grid"),
        (lambda x: model_of(RegionalAggregator(TimeSlices(2)), (None, 3)), "static sizes"),
        (lambda x: BlockDense(4, Blocks(9, 1))(x), "9 regions"),
    ],
)
def test_wrong_use(use: Callable[[np.ndarray], object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        use(image())
    assert (
        isinstance(refused.value, PartitionError)
        or "PartitionError" in repr(refused.value)
        or says in str(refused.value)
        or refused.match(says)
    )


def test_too_little_memory() -> None:
    with pytest.raises((BudgetError, ValueError), match="one region must fit"):
        RegionalAggregator(Grid(2, 2), "mean", local=cnn(), memory="1kB")(image())


# --------------------------------------------------------------------------------------- BlockDense


# ------------------------------------------------------------------------------------------ KMeans


def token_set() -> keras.Sequential:
    return keras.Sequential([layers.Flatten(), layers.Dense(2)])


def take_weights(twin: TorchAggregator, layer: RegionalAggregator, name: str) -> None:
    """The Keras layer's centres and weights, in the PyTorch layer."""
    kernels, biases = (torch.tensor(as_numpy(w)) for w in layer.stacked.stacked_weights)
    with torch.no_grad():
        twin.clusters.centres.copy_(torch.tensor(as_numpy(layer.clusters.centres)))
        for own in twin.local.parameters():
            own.copy_(kernels.mT if own.dim() == 3 else biases)
        if name == "softmax":
            next(iter(twin.score.parameters())).copy_(torch.tensor(as_numpy(layer.score.kernel)).T)


@pytest.mark.parametrize(
    ("name", "memory"), [*((n, None) for n in ["stitch", *REDUCTIONS]), ("stitch", "10kB"), ("softmax", "10kB")]
)
def test_balanced_clusters_equal_pytorch(name: str, memory: str | None) -> None:
    """Regions of tokens, one network for each."""
    kind, x = (
        KMeans(3, balanced=True, capacity=5),
        np.random.default_rng(0).standard_normal((2, 13, 4)).astype("float32"),
    )
    local = layers.Dense(2) if name == "stitch" else token_set()
    layer = RegionalAggregator(kind, name, local=local, per_region=True, memory=memory)
    y = layer(x)
    dense = torch.nn.Linear(4 if name == "stitch" else 20, 2)
    twin = TorchAggregator(
        kind,
        name,
        local=dense if name == "stitch" else torch.nn.Sequential(torch.nn.Flatten(1), dense),
        per_region=True,
    ).eval()
    twin(torch.tensor(x))
    take_weights(twin, layer, name)
    np.testing.assert_allclose(as_numpy(y), twin(torch.tensor(x)).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert tuple(layer.compute_output_shape((None, 13, 4)))[1:] == tuple(y.shape[1:])


@pytest.mark.parametrize("name", ["stitch", *REDUCTIONS[:-1]])
def test_unbalanced_clusters_equal_pytorch(name: str) -> None:
    """Tokens one by one through their regions' networks, some absent."""
    x = np.random.default_rng(0).standard_normal((2, 13, 4)).astype("float32")
    mask = np.random.default_rng(1).random((2, 13)) < 0.7
    layer = RegionalAggregator(KMeans(3), name, local=layers.Dense(2), per_region=True)
    twin = TorchAggregator(KMeans(3), name, local=torch.nn.Linear(4, 2), per_region=True).eval()
    y = layer(x, mask=ops.convert_to_tensor(mask))
    twin(torch.tensor(x))
    take_weights(twin, layer, name)
    theirs = twin(torch.tensor(x), mask=torch.tensor(mask))
    np.testing.assert_allclose(as_numpy(y), theirs.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_absent_clusters() -> None:
    x = np.random.default_rng(0).standard_normal((5, 4)).astype("float32")
    layer = RegionalAggregator(KMeans(3), "stitch", local=layers.Dense(2, bias_initializer="ones"), per_region=True)
    present = np.array([[True, False, True]] * 5)
    y = as_numpy(layer(x, present=ops.convert_to_tensor(present)))
    region = as_numpy(layer.clusters.route(ops.convert_to_tensor(x), None).region)
    assert ((y == 0).all(1) == (region == 1)).all()


@pytest.mark.parametrize(
    ("kind", "several"),
    [(KMeans(3), True), (KMeans(3), False), (KMeans(3, balanced=True), BACKEND == "jax")],
    ids=["nearest-list", "nearest-stacked", "balanced"],
)
def test_clusters_fit_save_load(kind: KMeans, several: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((20, 9, 4)).astype("float32")
    local = [layers.Dense(4) for _ in range(3)] if several else layers.Dense(4)
    layer = RegionalAggregator(kind, "stitch", local=local, per_region=not several)
    layer.adapt(x)
    model = model_of(layer, (9, 4))
    model.compile("adam", "mse")
    before = model.evaluate(x, x, verbose=0)
    model.fit(x, x, epochs=5, verbose=0)
    assert model.evaluate(x, x, verbose=0) < before
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda x: RegionalAggregator(KMeans(2), "mean")(x[0]), "lies in one region"),
        (lambda x: RegionalAggregator(KMeans(2), "concat")(x), "differ in size"),
        (lambda x: RegionalAggregator(KMeans(2), "stitch", memory="1MB"), "balanced=True"),
        (lambda x: RegionalAggregator(KMeans(2), coordinates=True), "needs a Grid"),
        (lambda x: RegionalAggregator(KMeans(2, balanced=True, capacity=3), "stitch")(x), "at least 4"),
        (
            lambda x: RegionalAggregator(KMeans(2, balanced=True), "max")(keras.Input((None, 4))),
            "known number of tokens",
        ),
        (
            lambda x: RegionalAggregator(KMeans(2, balanced=True), "stitch", local=layers.Flatten(), per_region=True)(
                x
            ),
            "must keep them",
        ),
        (lambda x: RegionalAggregator(Grid(2, 2)).adapt(x), "fits the centres of KMeans"),
    ],
)
def test_wrong_use_of_clusters(use: Callable[[np.ndarray], object], says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        use(image(3, 8, 4))


@pytest.mark.parametrize("blocks", [Blocks(2, 2), Blocks(1, 3), Blocks(5, 5)])
def test_blocks_are_the_uncut_layer(blocks: Blocks, tmp_path: Path) -> None:
    whole, cut, x = layers.Dense(5, "relu"), BlockDense(5, blocks, "relu"), image(3, 4, 5)
    model = model_of(cut, (4, 5))
    whole.build(x.shape)
    cut.set_dense(*whole.get_weights())
    np.testing.assert_allclose(as_numpy(model(x)), as_numpy(whole(x)), rtol=1e-5, atol=1e-6)
    dense, parts = gradients(whole, x), gradients(cut, x)
    for v, g in zip(cut.trainable_variables, parts):
        if v.name.startswith("kernel"):
            i, j = (int(k) for k in v.name.split("_")[1:])
            (a, b), (c, d) = cut.rows[i], cut.columns[j]
            np.testing.assert_allclose(g, dense[0][a:b, c:d], rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(as_numpy(keras.saving.load_model(tmp_path / "m.keras")(x)), as_numpy(model(x)))


def test_the_article_s_examples() -> None:
    """Section 4's blocks, and SimpleNet compiled with sgd and mse, ten epochs."""
    article = example("article_keras")
    losses = article.train()
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert article.blocks_of_five() < 1e-6


def test_each_network_of_a_list_is_built_on_its_own_region() -> None:
    """Five features in two blocks: 3 and 2."""
    layer = RegionalAggregator(Blocks(2), "sum", local=[keras.layers.Dense(4), keras.layers.Dense(4)])
    x = np.random.default_rng(0).normal(size=(2, 5)).astype("float32")
    first, second = layer.locals[0], layer.locals[1]
    y = ops.convert_to_numpy(layer(x))
    assert (first.kernel.shape[0], second.kernel.shape[0]) == (3, 2)
    by_hand = ops.convert_to_numpy(first(x[:, :3]) + second(x[:, 3:]))
    np.testing.assert_allclose(y, by_hand, atol=1e-5)
