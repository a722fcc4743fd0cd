"""`RegionExperts` in Keras: each sample through its own network, beside PyTorch's; centres; citizens; wrong use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

from ranger_nn import Grid, InputError, KMeans, PartitionError
from ranger_nn.keras import RegionExperts
from ranger_nn.torch import RegionExperts as TorchExperts

BACKEND = keras.backend.backend()
KINDS = [KMeans(5), KMeans(5, balanced=True), KMeans(5, balanced=True, capacity=9), KMeans(40)]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def samples(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def mlp() -> keras.Sequential:
    return keras.Sequential([layers.Dense(6, "tanh"), layers.Dense(2)])


def as_numpy(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(x)


def torch_twin(layer: RegionExperts, kind: KMeans) -> TorchExperts:
    """PyTorch's layer with the same numbers."""
    twin = TorchExperts(
        kind, torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)), features=4
    ).double()
    own = [torch.tensor(as_numpy(w)) for w in layer.stacked.stacked_weights]
    names = ["local.0/weight", "local.0/bias", "local.2/weight", "local.2/bias"]
    state = {n: w.mT if "weight" in n else w for n, w in zip(names, own)}
    state |= {"clusters.centres": torch.tensor(as_numpy(layer.clusters.centres))}
    state |= {"clusters.unseen": torch.tensor(as_numpy(layer.clusters.unseen)).float()}
    twin.load_state_dict(state)
    return twin.eval()


def gradients(layer: RegionExperts, x: np.ndarray, mask: Any) -> tuple[np.ndarray, ...]:
    """(result, gradients of the sum of squares with respect to the input and to the networks' weights)."""
    x, weights = ops.convert_to_tensor(x), [w.value for w in layer.trainable_variables]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask)
            loss = ops.sum(ops.square(y))
        return tuple(as_numpy(tf.convert_to_tensor(g)) for g in (y, *tape.gradient(loss, [x, *weights])))
    if BACKEND == "jax":
        import jax

        def loss_of(x: Any, own: list[Any]) -> Any:
            still = [v.value for v in layer.non_trainable_variables]
            y = layer.stateless_call(own, still, x, mask=mask)[0]
            return ops.sum(ops.square(y)), y

        # one compilation, and not one for each operation
        (of_x, of_weights), y = jax.jit(jax.grad(loss_of, argnums=(0, 1), has_aux=True))(x, weights)
        return tuple(as_numpy(g) for g in (y, of_x, *of_weights))
    x.requires_grad_()
    y = layer(x, mask=mask)
    found = torch.autograd.grad(ops.sum(ops.square(y)), [x, *weights])
    return tuple(as_numpy(g) for g in (y.detach(), *found))


CASES = [
    (KINDS[0], (23, 4), False),
    (KINDS[0], (3, 11, 4), True),
    (KINDS[1], (3, 11, 4), False),
    (KINDS[2], (23, 4), True),
    (KINDS[2], (3, 11, 4), True),
    (KINDS[3], (23, 4), True),
]


@pytest.mark.parametrize(("kind", "shape", "masked"), CASES, ids=str)
def test_equals_pytorch(kind: KMeans, shape: tuple[int, ...], masked: bool) -> None:
    """Result and gradients; PyTorch's are tested against each sample alone. Keras has float64 on TensorFlow alone."""
    dtype, within = ("float64", 1e-11) if BACKEND == "tensorflow" else ("float32", 1e-5)
    keras.config.set_dtype_policy(dtype)
    layer, x = RegionExperts(kind, mlp()), samples(*shape).astype(dtype)
    mask = samples(2, *shape[:-1])[1] < 0.6 if masked else None
    layer.build(shape)
    y, *grads = gradients(layer, x, None if mask is None else ops.convert_to_tensor(mask))
    twin, leaf = torch_twin(layer, kind), torch.tensor(x).double().requires_grad_()
    theirs = twin(leaf, None if mask is None else torch.tensor(mask))
    np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=within, atol=within)
    found = torch.autograd.grad(theirs.square().sum(), [leaf, *(p for n, p in twin.named_parameters() if "local" in n)])
    for k, (a, b) in enumerate(zip(grads, found, strict=True)):
        b = b.mT if k and b.dim() == 3 else b
        np.testing.assert_allclose(a, b.numpy(), rtol=10 * within, atol=10 * within)


def test_moving_average() -> None:
    """By hand, in training only."""
    layer, x = RegionExperts(KMeans(3, decay=0.75), mlp()), samples(50, 4).astype("float32")
    layer(x)
    before = as_numpy(layer.clusters.centres)
    region = ((x[:, None] - before) ** 2).sum(2).argmin(1)
    means = np.stack([x[region == r].mean(0) for r in range(3)])
    layer(x, training=True)
    np.testing.assert_allclose(as_numpy(layer.clusters.centres), 0.75 * before + 0.25 * means, rtol=1e-5, atol=1e-6)


def test_adapt() -> None:
    """Before and after the first call; the same for the same seed."""
    x = (10 * np.eye(4)[np.arange(40) % 4] + 0.1 * samples(40, 4)).astype("float32")
    made = [RegionExperts(KMeans(4, seed=3), mlp()) for _ in range(2)]
    made[1].build(x.shape)
    for layer in made:
        layer.adapt(x)
    np.testing.assert_array_equal(as_numpy(made[0].clusters.centres), as_numpy(made[1].clusters.centres))
    np.testing.assert_allclose(np.sort(as_numpy(made[0].clusters.centres).max(1)), 10, atol=0.2)
    assert as_numpy(made[0](x)).shape == (40, 2)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_fit_save_load(update: str, tmp_path: Path) -> None:
    """Functional model, `fit`, `.keras` file: the same predictions; the centres move and are saved."""
    x = samples(64, 4).astype("float32") + 3
    inputs = keras.Input((4,))
    layer = RegionExperts(KMeans(4, update=update), mlp())
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, 2)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    start, before = as_numpy(layer.clusters.centres), model.evaluate(x, x[:, :2], verbose=0)
    model.fit(x, x[:, :2], epochs=20, batch_size=20, verbose=0)
    assert model.evaluate(x, x[:, :2], verbose=0) < before
    assert np.abs(as_numpy(layer.clusters.centres) - start).max(1).min() > 0
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert len(layer.trainable_variables) == (5 if update == "gradient" else 4)


def test_balanced_fit() -> None:
    """A last batch that is smaller."""
    x = samples(50, 4).astype("float32")
    model = keras.Sequential([keras.Input((4,)), RegionExperts(KMeans(4, balanced=True, capacity=13), mlp())])
    model.compile("adam", "mse")
    model.fit(x, x[:, :2], epochs=1, batch_size=20, verbose=0)
    assert model.predict(x, batch_size=50, verbose=0).shape == (50, 2)


def test_masks_of_steps() -> None:
    """From a masking layer; masked steps give zero, and the mask goes on."""
    x = samples(2, 6, 4).astype("float32")
    x[0, 4:] = 0
    layer = RegionExperts(KMeans(3), mlp())
    inputs = keras.Input((6, 4))
    out = layer(layers.Masking()(inputs))
    y = keras.Model(inputs, out).predict(x, verbose=0)
    assert (y[0, 4:] == 0).all()
    assert (y[0, :4] != 0).all()
    assert (y[1] != 0).all()
    assert layer.compute_mask(x, "the mask") == "the mask"
    assert tuple(layer.compute_output_shape((None, 6, 4))) == (None, 6, 2)


@pytest.mark.parametrize("policy", ["mixed_bfloat16"] if BACKEND == "jax" else ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy: str) -> None:
    """Networks in half precision, routing and centres in float32."""
    keras.config.set_dtype_policy(policy)
    layer, x = RegionExperts(KMeans(3), mlp()), samples(20, 4).astype("float32")
    y = layer(x, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    assert layer.clusters.centres.dtype == "float32"
    assert np.isfinite(as_numpy(ops.cast(y, "float32"))).all()


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles on torch through inductor, which needs a C++ compiler")
def test_jit() -> None:
    """Forward, backward and a step of the centres; balanced, `fit` compiles by itself."""
    x = samples(24, 4).astype("float32")
    found = []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,), batch_size=24)
        layer = RegionExperts(KMeans(3), mlp())
        model = keras.Model(inputs, layer(inputs))
        model.compile("sgd", "mse", jit_compile=jit)
        model.fit(x, x[:, :2], epochs=2, batch_size=24, verbose=0)
        found.append([as_numpy(w) for w in layer.weights])
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_config() -> None:
    layer = RegionExperts(KMeans(3, balanced=True, capacity=4), mlp(), features=4)
    again = RegionExperts.from_config(layer.get_config())
    assert again.partition == layer.partition
    assert again.features == 4


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        (lambda x: RegionExperts(Grid(2), mlp()), PartitionError, "got Grid"),
        (lambda x: RegionExperts(KMeans(2), [mlp()]), PartitionError, "keras.layers.Layer; got list"),
        (lambda x: RegionExperts(KMeans(2), layers.BatchNormalization()), PartitionError, "has state"),
        (lambda x: RegionExperts(KMeans(2), layers.GRU(3)), PartitionError, "recurrent"),
        (
            lambda x: RegionExperts(KMeans(3, balanced=True, capacity=2), mlp())(x),
            PartitionError,
            "capacity 2 hold 6, there are 9",
        ),
        (lambda x: RegionExperts(KMeans(3), mlp(), features=5)(x), InputError, "5 features; got shape .9, 4."),
        (lambda x: RegionExperts(KMeans(3), mlp())(x[0]), InputError, r"got shape \(4,\)"),
        (lambda x: RegionExperts(KMeans(10), mlp()).adapt(x), InputError, "the data has 9"),
        (lambda x: RegionExperts(KMeans(3), mlp()).adapt(x * np.nan), InputError, "36 of 36 are NaN"),
    ],
)
def test_wrong_use(use: Callable[[np.ndarray], object], error: type[ValueError], says: str) -> None:
    with pytest.raises(error, match=says):
        use(samples(9, 4).astype("float32"))
